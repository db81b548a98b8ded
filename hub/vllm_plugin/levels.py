"""The level of a question before its prompt is made, from the few weights of a checkpoint that decide it (Eq. 1-3).

An engine reserves the places of the image tokens before it runs the model, and the level says how many there are. What
decides it is small: the decoder's first layer, the controller, and the embeddings of the question's tokens.
"""

import copy
import json
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModel
from transformers.utils.hub import cached_file

from modeling_granulon import GranularityController
from modeling_granulon.granularity_controller import question_states

DECODER, CONTROLLER = "model.language_model.", "model.granularity_controller."
REMEMBERED = 4096  # questions


class Weights:
    """Tensors of a checkpoint in safetensors files, read one by one. `model` is a folder or a name on the Hub."""

    def __init__(self, model: str, revision: str | None = None):
        index = cached_file(
            model, "model.safetensors.index.json", revision=revision, _raise_exceptions_for_missing_entries=False
        )
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values())) if index else None
        self.files = {}
        for name in names or ["model.safetensors"]:
            file = safe_open(cached_file(model, name, revision=revision), "pt")
            self.files |= dict.fromkeys(file.keys(), file)

    def read(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose names start with `prefix`, which is taken off."""
        names = [name for name in self.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.files[name].get_tensor(name) for name in names}

    def rows(self, name: str, numbers: list[int]) -> torch.Tensor:
        """The named rows of a matrix, without the others."""
        table = self.files[name].get_slice(name)
        return torch.stack([table[number] for number in numbers])


class EmbeddingRows(nn.Module):
    """Embeds (B,T) ids with the rows of a stored table, in `dtype`."""

    def __init__(self, weights: Weights, dtype: torch.dtype):
        super().__init__()
        self.weights, self.dtype = weights, dtype

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        rows = self.weights.rows(f"{DECODER}embed_tokens.weight", input_ids.flatten().tolist())
        return rows.to(self.dtype).unflatten(0, input_ids.shape)


class LevelChooser:
    """
    What the controller of a checkpoint chooses for a question.

    Args:
        config (`GranulonConfig`): of the checkpoint; its controller must be learned.
        model (`str`): folder or name on the Hub of the checkpoint, in safetensors files that are not quantised.
        dtype (`torch.dtype`): in which the decoder's layer computes, that of the model that answers.

    Raises:
        ValueError: weights that are missing or quantised.
    """

    def __init__(self, config, model: str, dtype: torch.dtype, revision: str | None = None):
        weights = Weights(model, revision)
        text = copy.deepcopy(config.text_config)
        text.num_hidden_layers, text.vocab_size, text.pad_token_id = config.controller_layers, 1, None
        text._attn_implementation = "sdpa"
        self.layers = config.controller_layers
        self.decoder = AutoModel.from_config(text).eval()
        for number, layer in enumerate(self.decoder.layers):
            _load(
                layer, weights.read(f"{DECODER}layers.{number}."), f"layer {number} of the language model in {model}"
            )
        self.controller = GranularityController(
            config.text_config.hidden_size,
            config.controller_hidden_size,
            len(config.granularities),
            config.projector_hidden_act,
        ).eval()
        _load(self.controller, weights.read(CONTROLLER), f"the controller in {model}")
        self.decoder.to(dtype)
        self.controller.to(torch.float32 if dtype == torch.float16 else dtype)
        self.decoder.embed_tokens = EmbeddingRows(weights, dtype)
        self.choose = lru_cache(maxsize=REMEMBERED)(self._choose)

    @torch.inference_mode()
    def _choose(self, question_ids: tuple[int, ...]) -> int:
        """The index of the level that the controller chooses for a question of at least one token."""
        ids = torch.tensor([question_ids])
        mask = torch.ones_like(ids)
        states = question_states(self.decoder, ids, mask, self.layers)
        return int(self.controller(states, mask).argmax(-1))


def _load(module: nn.Module, tensors: dict[str, torch.Tensor], what: str):
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ValueError(
            f"{what} does not have the weights that choose a level ({', '.join(wrong[:3])}); expected a full "
            "checkpoint that is not quantised"
        )
    module.load_state_dict(tensors)
