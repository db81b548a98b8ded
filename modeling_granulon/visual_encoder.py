"""The decoder-free part of Granulon: a frozen tower, the aggregation of its patches, and the projector (Eq. 4-8).

Shapes: I images, J images of the rows (I, unless rows share images), N patches of the H x W grid, K semantic slots,
D vision width, E text width.
"""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .adaptive_token_aggregation import AdaptiveTokenAggregation, AggregationOutput, kept_tokens
from .configuration_granulon import GranulonConfig
from .image_tokens import FULL, PIXEL, SEMANTIC
from .multi_modal_projector import GranulonMultiModalProjector
from .vision_features import COLUMN_STRIDE, VisionFeatures, vision_features


class GranulonPreTrainedModel(PreTrainedModel):
    config_class = GranulonConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # Quantizers leave these modules out too. The pattern holds within the head and within the base model.
    _keep_in_fp32_modules = [r"(?:model\.)?(?:multi_modal_projector|granularity_controller)"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers; the vision tower comes frozen. Unfreeze it afterwards to train it."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.base_model.vision_tower.requires_grad_(False)
        return loaded

    def save_pretrained(self, *args, **kwargs):
        """As in transformers; also of a model in FSDP2's class, with the code and the names of its own."""
        sharded = type(self)
        self.__class__ = next(kind for kind in sharded.__mro__ if not kind.__module__.startswith("torch."))
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = sharded

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, GranulonMultiModalProjector) and module.has_levels:
            for parameter in (module.gain_offsets, module.level_embedding, module.cluster_embedding):
                init.zeros_(parameter)


class GranulonVisualEncoder(GranulonPreTrainedModel):
    """Tower, aggregation and projector. `from_pretrained` takes them out of a whole checkpoint.

    Engines that have a decoder of their own use this part alone; `GranulonModel` adds controller and decoder.
    """

    _keys_to_ignore_on_load_unexpected = [r"^(?:model\.)?(?:language_model|granularity_controller)\.", r"^lm_head\."]

    def __init__(self, config: GranulonConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config).requires_grad_(False)
        self.multi_modal_projector = GranulonMultiModalProjector(config)
        self.aggregation = AdaptiveTokenAggregation(
            relation_weight=config.relation_weight,
            iterations=config.cluster_iterations,
            refinement_iterations=config.refinement_iterations,
            score_weights=tuple(config.score_weights),
        )
        self.add_decoder(config)
        self.post_init()
        self.train(self.training)

    def add_decoder(self, config: GranulonConfig):
        """What a subclass has beside the visual part; nothing here."""

    def train(self, mode: bool = True):
        """As in torch, but the tower stays in eval mode: DINOv3 jitters its position embedding in train mode."""
        super().train(mode)
        self.vision_tower.eval()
        return self

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        granularity: str | int | None = None,
        visual_view: str = FULL,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Image tokens at one level, for callers that have no question or have chosen the level before.

        `pooler_output` is a list with one (N + K_level, E) tensor per image, which holds no empty slot; the other
        fields are the tower's. Reads no value on the host, so that `torch.export` can trace it.

        Args:
            pixel_values: (I,3,h,w), h and w multiples of the patch size.
            granularity: name or index of the level, by default the model's default.
            visual_view: "full", or "pixel" or "semantic" for the N or the K_level tokens alone.
        """
        kwargs.pop("return_dict", None)
        vision, level_I, parts = self._vision(pixel_values, **kwargs), None, []
        if self.config.granularities:
            level = self.config.granularity_index(
                self.config.default_granularity if granularity is None else granularity
            )
            level_I = torch.full_like(pixel_values[:, 0, 0, 0], level, dtype=torch.long)
        if visual_view != SEMANTIC:
            parts.append(self.multi_modal_projector(vision.features, level_I))
        if visual_view != PIXEL and level_I is not None:
            parts.append(self._semantic_tokens(vision, self._relation(vision), level)[0])
        tokens_ISE = torch.cat(parts, dim=1)
        return BaseModelOutputWithPooling(
            last_hidden_state=vision.outputs.last_hidden_state,
            pooler_output=list(tokens_ISE),
            hidden_states=vision.outputs.get("hidden_states"),
            attentions=vision.outputs.get("attentions"),
        )

    def _vision(self, pixel_values: torch.FloatTensor, **tower_kwargs) -> VisionFeatures:
        """Patch features and relation map; without gradients as long as the tower is frozen."""
        trains = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            return vision_features(
                self.vision_tower, pixel_values, layer=self.config.vision_feature_layer, **tower_kwargs
            )

    def _relation(self, vision: VisionFeatures) -> torch.Tensor | None:
        return vision.relation.profiles(COLUMN_STRIDE) if self.config.relation_weight > 0 else None

    def _semantic_tokens(
        self,
        vision: VisionFeatures,
        relation: torch.Tensor | None,
        level: int,
        images: torch.Tensor | slice = slice(None),
    ) -> tuple[torch.Tensor, AggregationOutput]:
        """Eq. 4-8 for the named images at one level: projected tokens (i,K_level,E), and what they were made from."""
        candidate = self.config.granularities[level]
        clusters = self.aggregation(
            vision.features[images],
            None if relation is None else relation[images],
            candidate["stride"],
            candidate["clusters"],
            grid=vision.grid,
            top_k=candidate["keep"],
        )
        used = kept_tokens(vision.grid, candidate["stride"], candidate["clusters"], candidate["keep"])
        level_I = torch.full((len(clusters.tokens),), level, device=clusters.tokens.device)
        tokens_IKE = self.multi_modal_projector(clusters.tokens[:, :used], level_I, clusters.geometry[:, :used])
        return tokens_IKE, clusters

    def _semantic_slots(
        self, vision: VisionFeatures, pixel_JNE: torch.Tensor, levels: list[int], every_level: bool, image_index_J
    ):
        """Image tokens at each image's own level, and, if asked for, the semantic tokens of every level."""
        images, slots, device = len(levels), self.config.max_semantic_tokens, pixel_JNE.device
        semantic_JKE = pixel_JNE.new_zeros(images, slots, pixel_JNE.shape[-1])
        mask_JK = torch.zeros(images, slots, dtype=torch.bool, device=device)
        map_JHW = torch.zeros(images, *vision.grid, dtype=torch.long, device=device)
        scores_JK = torch.zeros(images, slots, device=device)
        relation, every = self._relation(vision), []
        for level in range(len(self.config.granularities)) if every_level else sorted(set(levels)):
            own = [number for number, chosen in enumerate(levels) if chosen == level]
            own_j = torch.tensor(own, dtype=torch.long, device=device)
            wanted = image_index_J[own_j]
            tokens_IKE, clusters = self._semantic_tokens(
                vision, relation, level, slice(None) if every_level else wanted
            )
            used = tokens_IKE.shape[1]
            if every_level:
                every.append(nn.functional.pad(tokens_IKE, (0, 0, slots - used, 0))[image_index_J])
                tokens_IKE, clusters = tokens_IKE[wanted], AggregationOutput(*(field[wanted] for field in clusters))
            # Used slots stand last, so that whatever follows an image follows a real token.
            semantic_JKE[own_j, slots - used :] = tokens_IKE.to(semantic_JKE.dtype)
            mask_JK[own_j, :used] = True
            map_JHW[own_j] = clusters.assignment
            scores_JK[own_j, : clusters.scores.shape[1]] = clusters.scores
        return {
            "image_hidden_states": torch.cat([pixel_JNE, semantic_JKE], dim=1),
            "semantic_mask": mask_JK,
            "cluster_map": map_JHW,
            "cluster_scores": scores_JK,
            "level_hidden_states": torch.stack(every, dim=1) if every_level else None,
        }


def check_finite(finite_I: list):
    if not all(finite_I):
        raise ValueError(
            f"image {finite_I.index(False)} has features that are not finite; check its pixel_values for NaN or "
            "infinity, and use bfloat16 instead of float16 if the tower overflows"
        )
