"""The text-conditioned granularity controller: the question decides how coarsely the image is read (Eq. 1-3).

Shapes: B rows of text, T question tokens, E text width, C controller width, G granularities.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask


class GranularityController(nn.Module):
    """Logits over the candidates g_1..g_G from the states of the question's tokens (Eq. 2, 3).

    The states are standardised token by token before the mean (ours): hidden states differ in scale between language
    models and layers, and the first token's state can be a hundred times as long as any other. Both run in fp32. The
    activation is the projector's (our choice, the paper leaves it open).
    """

    def __init__(self, text_width: int, hidden_size: int, num_granularities: int, activation: str):
        super().__init__()
        self.projection = nn.Linear(text_width, hidden_size)  # W_p
        self.linear_1 = nn.Linear(hidden_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, num_granularities)
        self.act = ACT2FN[activation]

    def forward(self, states_BTE: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """states (B,T,E) and mask (B,T), 1 on question tokens, give logits (B,G); a row without tokens sees a zero."""
        return self.classify(self.pool(states_BTE, mask_BT))

    def pool(self, states_BTE: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """The mean over the question's tokens of their standardised states, (B,E) fp32; it has no weights."""
        standard_BTE = nn.functional.layer_norm(states_BTE.float(), states_BTE.shape[-1:])
        weights_BT1 = mask_BT.to(torch.float32).unsqueeze(-1)
        return (standard_BTE * weights_BT1).sum(1) / weights_BT1.sum(1).clamp_min(1)

    def classify(self, pooled_BE: torch.Tensor) -> torch.Tensor:
        """Logits (B,G) of pooled questions (B,E)."""
        # Eq. 2: h = W_p sigma(mean_i L1(T_e)_i)
        descriptor_BC = self.projection(self.act(pooled_BE.to(self.projection.weight.dtype)))
        # Eq. 3: logits = MLP(h)
        return self.linear_2(self.act(self.linear_1(descriptor_BC)))


def question_states(
    language_model: nn.Module, input_ids: torch.Tensor, mask_BT: torch.Tensor, layers: int
) -> torch.Tensor:
    """The states that the decoder's own first `layers` layers give of the question alone: (B,T) ids give (B,T,E).

    One layer is L1(T_e) of Eq. 2. The layers are called one by one, as the decoder's forward does: hooks, sharding
    and checkpointing that wrap a layer stay in force, and no other layer runs. Holds for decoders with full attention
    whose layers share one rotary embedding, which the configuration checks. Whether gradients flow is the caller's
    choice.
    """
    states_BTE = language_model.embed_tokens(input_ids)
    position_ids = (mask_BT.long().cumsum(-1) - 1).clamp_min(0)
    causal_mask = create_causal_mask(
        config=language_model.config,
        inputs_embeds=states_BTE,
        attention_mask=mask_BT,
        past_key_values=None,
        position_ids=position_ids,
    )
    position_embeddings = language_model.rotary_emb(states_BTE, position_ids)
    for layer in language_model.layers[:layers]:
        states_BTE = layer(
            states_BTE,
            attention_mask=causal_mask,
            position_ids=position_ids,
            position_embeddings=position_embeddings,
        )
    return states_BTE


def choose_granularity(logits_BG: torch.Tensor, fixed_B: torch.Tensor | None = None) -> torch.Tensor:
    """The level that acts, g* = argmax p (Eq. 3).

    Args:
        logits_BG: the controller's logits.
        fixed_B: long, the level of each row whose level is given (forced, default, random) and -1 elsewhere.

    Returns:
        index (B,) long.
    """
    index_B = logits_BG.argmax(-1)
    return index_B if fixed_B is None else torch.where(fixed_B >= 0, fixed_B, index_B)
