"""What a Granulon chose and saw of a batch of images, and its description in plain Python values (Eq. 1-8).

Shapes: B rows, I images, H x W patch grid, N = H * W patches, K semantic slots (K_max), E text width, G granularities.
"""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .adaptive_token_aggregation import kept_tokens
from .image_tokens import FULL, PIXEL, SEMANTIC, VISUAL_VIEWS, PlacedImages, SlotLayout, visible_roles
from .joint_views import PackedViews

CHOSEN_BY = CONTROLLER, REQUEST, DEFAULT, SETTING = range(4)
SOURCES = ("controller", "request", "default", "configuration")  # names of the codes above


@dataclass
class GranulonVisualOutput(ModelOutput):
    """Image tokens and the choices behind them, from `GranulonModel.encode`.

    A model without levels sets the first two alone.

    image_hidden_states (I,N+K,E): projected pixel tokens, then semantic slots in the order of the prompt: unused slots
        first, so that text follows a real token.
    images_per_row (B,) long, on the CPU: number of images of each row.
    semantic_mask (I,K) bool: which entries of cluster_scores are used.
    granularity_logits (B,G) or None: the controller's logits; None without controller or question.
    granularity_index (B,) long: the level of each row.
    chosen_by (B,) long: place in `SOURCES` of who chose the level.
    cluster_map (I,H,W) long: for each patch the number of its cluster.
    cluster_scores (I,K) fp32: quality of the clusters (Eq. 6), best first.
    level_hidden_states (I,G,K,E) or None: the semantic slots of every level, if `encode` was asked for them.
    """

    image_hidden_states: torch.FloatTensor | None = None
    images_per_row: torch.LongTensor | None = None
    semantic_mask: torch.BoolTensor | None = None
    granularity_logits: torch.FloatTensor | None = None
    granularity_index: torch.LongTensor | None = None
    chosen_by: torch.LongTensor | None = None
    cluster_map: torch.LongTensor | None = None
    cluster_scores: torch.FloatTensor | None = None
    level_hidden_states: torch.FloatTensor | None = None

    @classmethod
    def of(cls, config, **fields) -> "GranulonVisualOutput":
        """An output that can describe itself with the names of the configuration's levels."""
        output = cls(**fields)
        output.config = config
        return output

    def _check_rows(self, images_per_row: list[int]):
        own = self.images_per_row.tolist()
        if own != images_per_row:
            raise ValueError(
                f"the images were encoded for rows with {own} images, but the prompts have {images_per_row}; pass the "
                "same input_ids to encode"
            )

    def place(self, layout: SlotLayout, visual_view: str | None = None) -> PlacedImages:
        """Image tokens in the order of each row's placeholders.

        Raises:
            ValueError: rows and images that do not fit, an unknown view, or one that shows no image token of some row.
        """
        self._check_rows(layout.images_per_row)
        tokens_ISE = self.image_hidden_states
        used_IS = torch.ones(tokens_ISE.shape[:2], dtype=torch.bool, device=tokens_ISE.device)
        if self.semantic_mask is not None:
            used_IS[:, -self.semantic_mask.shape[1] :] = self.semantic_mask.flip(-1).to(used_IS.device)
        index_BR, role_BR = layout.index_BR.to(tokens_ISE.device), layout.role_BR.to(tokens_ISE.device)
        visible_BR = used_IS.flatten()[index_BR] & (role_BR > 0)
        if visual_view is not None:
            visible_BR &= visible_roles(role_BR, self.views(visual_view))
            if (visible_BR.any(-1) < (role_BR > 0).any(-1)).any():
                raise ValueError(
                    f"visual_view={visual_view!r} shows no image token of some row, whose prompt was made for another "
                    "view; call the processor without visual_view, or with the same one"
                )
        return PlacedImages(tokens_ISE.flatten(0, 1)[index_BR], visible_BR)

    def used_tokens(self, level: int) -> int:
        """Semantic tokens of an image at a level; fewer than its `keep` only where the grid has fewer cells."""
        candidate = self.config.granularities[level]
        grid = tuple(self.cluster_map.shape[-2:])
        return kept_tokens(grid, candidate["stride"], candidate["clusters"], candidate["keep"])

    def at_level(self, level: int) -> "GranulonVisualOutput":
        """The image tokens with the semantic tokens of another level, for an output with `level_hidden_states`."""
        slots = self.semantic_mask.shape[1]
        tokens_ISE = torch.cat([self.image_hidden_states[:, :-slots], self.level_hidden_states[:, level]], dim=1)
        used_K = torch.arange(slots, device=self.semantic_mask.device) < self.used_tokens(level)
        return GranulonVisualOutput(
            image_hidden_states=tokens_ISE,
            images_per_row=self.images_per_row,
            semantic_mask=used_K.expand_as(self.semantic_mask),
        )

    def views(self, visual_view: str) -> list[str]:
        """The view of each row: the one asked for, or with "auto" that of the row's level.

        Raises:
            ValueError: an unknown view.
        """
        if visual_view not in VISUAL_VIEWS:
            raise ValueError(f"visual_view is {visual_view!r}; choose one of {VISUAL_VIEWS}")
        if visual_view != "auto" or self.granularity_index is None:
            return [FULL if visual_view == "auto" else visual_view] * len(self.images_per_row)
        return [self.config.granularities[level]["view"] for level in self.granularity_index.tolist()]

    def describe(self, visual_view: str = "auto") -> list[dict]:
        """What was chosen and what the language model reads, row by row, in plain Python values.

        Args:
            visual_view: the view that is read: "full", "pixel", "semantic" or "auto".

        Returns:
            for each row a dict with
                granularity: name, chosen_by (one of `SOURCES`) and probabilities by name (None where the controller
                    did not read the question); None for a model without levels;
                view: the row's view;
                tokens: numbers of `pixel` and `semantic` tokens that are read;
                images: for each image its `clusters` (number from 1, score, share of the patches) and its
                    `cluster_map` (H,W) as a numpy array of cluster numbers from 0, or None without levels.

        Raises:
            ValueError: an unknown view.
        """
        image, rows = 0, []
        for row, (count, view) in enumerate(zip(self.images_per_row.tolist(), self.views(visual_view), strict=True)):
            slots = 0 if self.semantic_mask is None else self.semantic_mask.shape[1]
            used = self.used_tokens(int(self.granularity_index[row])) if slots else 0
            view = view if slots else PIXEL
            pixel = self.image_hidden_states.shape[1] - slots
            rows.append(
                {
                    "granularity": self._level(row) if slots else None,
                    "view": view,
                    "tokens": {
                        "pixel": 0 if view == SEMANTIC else pixel * count,
                        "semantic": 0 if view == PIXEL else used * count,
                    },
                    "images": [self._clusters(number) for number in range(image, image + count)],
                }
            )
            image += count
        return rows

    def _level(self, row: int) -> dict:
        names, probabilities = self.config.granularity_names, None
        if self.granularity_logits is not None:
            probabilities = dict(zip(names, self.granularity_logits[row].float().softmax(-1).tolist(), strict=True))
        return {
            "name": names[int(self.granularity_index[row])],
            "chosen_by": SOURCES[int(self.chosen_by[row])],
            "probabilities": probabilities,
        }

    def _clusters(self, image: int) -> dict:
        if self.cluster_map is None:
            return {"clusters": [], "cluster_map": None}
        map_HW, used = self.cluster_map[image].cpu().numpy(), int(self.semantic_mask[image].sum())
        clusters = [
            {"number": number + 1, "score": score, "share": float((map_HW == number).mean())}
            for number, score in enumerate(self.cluster_scores[image, :used].tolist())
        ]
        return {"clusters": clusters, "cluster_map": map_HW}


@dataclass
class GranulonModelOutputWithPast(GranulonVisualOutput, BaseModelOutputWithPast):
    """The decoder's outputs and the visual ones.

    With `joint_views`, `last_hidden_state` is (B,P,E) over the packed sequence, and `packed_views` says which prompt
    token and which view each packed token belongs to.
    """

    packed_views: PackedViews | None = None


@dataclass
class GranulonCausalLMOutputWithPast(GranulonVisualOutput, CausalLMOutputWithPast):
    """The head's outputs (`loss` is a mean over next tokens, `logits` are (B,T,vocab)) and the visual ones."""

    packed_views: PackedViews | None = None
