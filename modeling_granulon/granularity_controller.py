"""The text-conditioned granularity controller: the question decides how coarsely the image is read (Eq. 1-3).

Shapes: B rows of text, T question tokens, E text width, C controller width, G granularities.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask


class GranularityController(nn.Module):
    """Logits over the candidates g_1..g_G from the question's first-layer states (Eq. 2, 3).

    The mean runs over the question's own tokens and in fp32; sigma is the projector's activation (our choice, the
    paper leaves it open).
    """

    def __init__(self, text_width: int, hidden_size: int, num_granularities: int, activation: str):
        super().__init__()
        self.projection = nn.Linear(text_width, hidden_size)  # W_p
        self.linear_1 = nn.Linear(hidden_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, num_granularities)
        self.act = ACT2FN[activation]

    def forward(self, states_BTE: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """states (B,T,E) and mask (B,T), 1 on question tokens, give logits (B,G); a row without tokens sees a zero."""
        weights_BT1 = mask_BT.to(torch.float32).unsqueeze(-1)
        count_B1 = weights_BT1.sum(1).clamp_min(1)
        mean_BE = (states_BTE.float() * weights_BT1).sum(1) / count_B1
        # Eq. 2: h = W_p sigma(mean_i L1(T_e)_i)
        descriptor_BC = self.projection(self.act(mean_BE.to(self.projection.weight.dtype)))
        # Eq. 3: logits = MLP(h)
        return self.linear_2(self.act(self.linear_1(descriptor_BC)))


def first_layer_states(language_model: nn.Module, input_ids: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """L1(T_e) of Eq. 2: the decoder's own first layer over the embedded question, alone: (B,T) ids give (B,T,E)."""
    embeds_BTE = language_model.embed_tokens(input_ids)
    position_ids = (mask_BT.long().cumsum(-1) - 1).clamp_min(0)
    causal_mask = create_causal_mask(
        config=language_model.config,
        inputs_embeds=embeds_BTE,
        attention_mask=mask_BT,
        past_key_values=None,
        position_ids=position_ids,
    )
    states = language_model.layers[0](
        embeds_BTE,
        attention_mask=causal_mask,
        position_ids=position_ids,
        position_embeddings=language_model.rotary_emb(embeds_BTE, position_ids),
    )
    return states[0] if isinstance(states, tuple) else states


def choose_granularity(
    logits_BG: torch.Tensor, fixed_B: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The level that acts, g* = argmax p, and the weights of the soft gains (Eq. 3).

    Args:
        logits_BG: the controller's logits.
        fixed_B: long, the level of each row whose level is given (forced, default, random) and -1 elsewhere.

    Returns:
        index (B,) long and weights (B,G): p where the controller decides, one-hot where the level is given.
    """
    weights_BG = logits_BG.float().softmax(-1)
    index_B = weights_BG.argmax(-1)
    if fixed_B is None:
        return index_B, weights_BG
    given_B = fixed_B >= 0
    one_hot_BG = nn.functional.one_hot(fixed_B.clamp_min(0), logits_BG.shape[-1]).to(weights_BG.dtype)
    return torch.where(given_B, fixed_B, index_B), torch.where(given_B.unsqueeze(-1), one_hot_BG, weights_BG)
