"""Granulon: a frozen pixel-level tower, a question that picks the granularity, and one language-model pass.

Equations are those of docs/method.md. Shapes: B rows of text, T tokens, I images, H x W patch grid, N = H * W patches,
K semantic slots (K_max), R image slots of a row, D vision width, E text width, G granularities.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .adaptive_token_aggregation import AdaptiveTokenAggregation
from .configuration_granulon import VIEWS, GranulonConfig
from .generation_granulon import GranulonGenerationMixin
from .granularity_controller import GranularityController, choose_granularity, first_layer_states
from .joint_views import (
    FULL,
    PIXEL,
    SEMANTIC,
    PackedViews,
    gather_slots,
    hide_slots,
    kept_last,
    pack_views,
    positions,
    refuse_lone_placeholders,
    slot_layout,
    slot_roles,
    take,
    visible_roles,
)
from .vision_features import feature_width_of, patch_grid, vision_features


@dataclass
class GranulonVisualOutput(ModelOutput):
    """What the model chose and saw, without a language-model pass.

    image_hidden_states (I,N+K,E): projected pixel tokens, then semantic slots in the order of the prompt: empty slots
        first, so that text follows a real token.
    semantic_mask (I,K) bool: which clusters were kept, best score first.
    granularity_logits (B,G) or None: the controller's logits; None without controller or question.
    granularity_index (B,) long or None: the level of each row; None without levels.
    cluster_map (I,H,W) long: for each patch the kept cluster it belongs to, or -1.
    cluster_scores (I,K) fp32: quality of the kept clusters (Eq. 6).
    """

    image_hidden_states: torch.FloatTensor | None = None
    semantic_mask: torch.BoolTensor | None = None
    granularity_logits: torch.FloatTensor | None = None
    granularity_index: torch.LongTensor | None = None
    cluster_map: torch.LongTensor | None = None
    cluster_scores: torch.FloatTensor | None = None


@dataclass
class GranulonModelOutputWithPast(GranulonVisualOutput, BaseModelOutputWithPast):
    """The decoder's outputs and the visual ones.

    With `joint_views=True`, `last_hidden_state` is (B,P,E) over the packed sequence, and `packed_views` says what each
    of its tokens copies, in which view it stands and which labels count.
    """

    packed_views: PackedViews | None = None


@dataclass
class GranulonCausalLMOutputWithPast(GranulonVisualOutput, CausalLMOutputWithPast):
    """The head's outputs (`loss` is a mean over next tokens, `logits` are (B,T,vocab)) and the visual ones."""

    packed_views: PackedViews | None = None


class GranulonMultiModalProjector(nn.Module):
    """Llava's two-layer projector, and the gains of each level (Eq. 8): one for pixel, one for semantic tokens."""

    def __init__(self, config: GranulonConfig):
        super().__init__()
        vision_width, text_width = feature_width_of(config.vision_config), config.text_config.hidden_size
        self.linear_1 = nn.Linear(vision_width, text_width, bias=config.multimodal_projector_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(text_width, text_width, bias=config.multimodal_projector_bias)
        self.gains = nn.Parameter(torch.ones(len(config.granularities), 2)) if config.granularities else None

    def forward(
        self,
        patches_IND: torch.Tensor,
        semantic_IKD: torch.Tensor | None = None,
        weights_IG: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Patches (I,N,D) and cluster means (I,K,D) become tokens of text width, times the gains of their level."""
        pixel_INE = self._project(patches_IND)
        if self.gains is None:
            return pixel_INE, None
        # Eq. 8: Phi_gamma with gamma = sum_k p_k gamma_k
        gains_I2 = (weights_IG.to(self.gains.dtype) @ self.gains).to(pixel_INE.dtype)
        semantic_IKE = self._project(semantic_IKD)
        return pixel_INE * gains_I2[:, :1, None], semantic_IKE * gains_I2[:, 1:, None]

    def _project(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features.to(self.linear_1.weight.dtype))))


class GranulonPreTrainedModel(PreTrainedModel):
    config_class = GranulonConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, GranulonMultiModalProjector) and module.gains is not None:
            init.ones_(module.gains)


class GranulonModel(GranulonPreTrainedModel):
    """Tower, controller, aggregation, projector and decoder, without a head.

    Build it with `GranulonConfig`; load it with `AutoModel.from_pretrained(..., trust_remote_code=True)`.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: GranulonConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = GranulonMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        levels = len(config.granularities)
        self.granularity_controller = (
            GranularityController(
                config.text_config.hidden_size, config.controller_hidden_size, levels, config.projector_hidden_act
            )
            if levels > 1 and config.controller == "learned"
            else None
        )
        self.aggregation = AdaptiveTokenAggregation(
            relation_weight=config.relation_weight,
            iterations=config.cluster_iterations,
            score_weights=tuple(config.score_weights),
        )
        self.post_init()
        self.train(self.training)

    def train(self, mode: bool = True):
        """The tower stays frozen and in eval mode: DINOv3 jitters its position embedding in train mode."""
        super().train(mode)
        self.vision_tower.eval().requires_grad_(False)
        return self

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> BaseModelOutputWithPooling:
        """Image tokens at the default granularity, for callers that have no question.

        `pooler_output` is a list with one (N+K,E) tensor per image; the other fields are the tower's.
        """
        kwargs.pop("return_dict", None)
        visual, tower_outputs = self.encode_images(pixel_values, [1] * len(pixel_values), **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=tower_outputs.last_hidden_state,
            pooler_output=list(visual.image_hidden_states),
            hidden_states=tower_outputs.get("hidden_states"),
            attentions=tower_outputs.get("attentions"),
        )

    def encode_images(
        self,
        pixel_values: torch.FloatTensor,
        images_per_row: list[int],
        question_input_ids: torch.LongTensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        granularity: str | int | Sequence | torch.Tensor | None = None,
        **tower_kwargs,
    ) -> tuple[GranulonVisualOutput, ModelOutput]:
        """Images and the questions of their rows become image tokens: Eq. 1-8 up to the language model.

        Args:
            pixel_values: (I,3,h,w), h and w multiples of the patch size, the images of all rows in order.
            images_per_row: how many of them belong to each of the B rows.
            question_input_ids, question_attention_mask: (B,T), 1 on question tokens; a row without any takes the
                default granularity.
            granularity: name or index for all rows, or one per row, instead of the controller's choice.

        Returns:
            the visual output and the tower's own output.
        """
        with torch.no_grad():
            vision = vision_features(
                self.vision_tower, pixel_values, layer=self.config.vision_feature_layer, **tower_kwargs
            )
        finite_I = vision.features.isfinite().flatten(1).all(-1).tolist()
        if not all(finite_I):
            raise ValueError(
                f"image {finite_I.index(False)} has features that are not finite; check its pixel_values for NaN "
                "or infinity, and use bfloat16 instead of float16 if the tower overflows"
            )
        if not self.config.granularities:
            pixel_INE, _ = self.multi_modal_projector(vision.features)
            return GranulonVisualOutput(image_hidden_states=pixel_INE), vision.outputs

        logits_BG, index_B, weights_BG = self.choose_level(
            len(images_per_row), question_input_ids, question_attention_mask, granularity
        )
        row_I = torch.arange(len(images_per_row)).repeat_interleave(torch.tensor(images_per_row)).to(index_B.device)
        tokens_IKD, mask_IK, map_IHW, scores_IK = self._aggregate(vision, index_B[row_I].tolist())
        pixel_INE, semantic_IKE = self.multi_modal_projector(vision.features, tokens_IKD, weights_BG[row_I])
        # The kept tokens move to the end of the slots, so that whatever follows an image follows a real token.
        order_IK = kept_last(mask_IK).to(semantic_IKE.device)
        semantic_IKE = semantic_IKE.gather(1, order_IK.unsqueeze(-1).expand_as(semantic_IKE))
        visual = GranulonVisualOutput(
            image_hidden_states=torch.cat([pixel_INE, semantic_IKE], dim=1),
            semantic_mask=mask_IK,
            granularity_logits=logits_BG,
            granularity_index=index_B,
            cluster_map=map_IHW,
            cluster_scores=scores_IK,
        )
        return visual, vision.outputs

    def choose_level(self, num_rows, question_input_ids=None, question_attention_mask=None, granularity=None):
        """The level of each row (Eq. 1-3): forced, or the controller's, or the default where there is no question.

        Returns:
            logits (B,G) or None, index (B,) long, weights (B,G) of the gains.
        """
        names = self.config.granularity_names
        fixed_B = self._fixed_levels(num_rows, granularity)
        logits_BG = None
        if self.granularity_controller is not None and question_input_ids is not None:
            if len(question_input_ids) != num_rows:
                raise ValueError(f"{len(question_input_ids)} questions for {num_rows} prompts; pass one per prompt")
            if question_attention_mask is None:
                question_attention_mask = torch.ones_like(question_input_ids)
            states_BTE = first_layer_states(self.language_model, question_input_ids, question_attention_mask)
            logits_BG = self.granularity_controller(states_BTE, question_attention_mask.to(states_BTE.device))
            if granularity is None:
                asked_B = question_attention_mask.any(-1).to(logits_BG.device)
                fixed_B = torch.where(asked_B, -1, fixed_B.to(logits_BG.device))
        base_BG = torch.zeros(num_rows, len(names), device=self.device) if logits_BG is None else logits_BG
        return logits_BG, *choose_granularity(base_BG, fixed_B.to(base_BG.device))

    def _fixed_levels(self, num_rows: int, granularity) -> torch.Tensor:
        """Levels that need no question: as asked for, else the ablation's, else the default, (B,) long."""
        config = self.config
        if granularity is None:
            if config.controller == "random":
                return torch.randint(len(config.granularities), (num_rows,))
            granularity = config.default_granularity if config.controller == "learned" else config.controller
        if isinstance(granularity, torch.Tensor):
            granularity = granularity.tolist()
        if isinstance(granularity, (str, int)):
            granularity = [granularity] * num_rows
        if len(granularity) != num_rows:
            raise ValueError(f"{len(granularity)} granularities for {num_rows} rows; pass one, or one per row")
        return torch.tensor([config.granularity_index(level) for level in granularity])

    def _aggregate(self, vision, level_I: list[int]):
        """Eq. 4-7, one call per level that occurs; tokens (I,K,D), mask (I,K), map (I,H,W) and scores (I,K)."""
        features, slots = vision.features, self.config.max_semantic_tokens
        tokens = features.new_zeros(len(features), slots, features.shape[-1])
        mask = torch.zeros(len(features), slots, dtype=torch.bool, device=features.device)
        cluster_map = torch.full((len(features), *vision.grid), -1, device=features.device)
        scores = torch.zeros(len(features), slots, device=features.device)
        for level in sorted(set(level_I)):
            candidate = self.config.granularities[level]
            images = torch.tensor([i for i, own in enumerate(level_I) if own == level], device=features.device)
            use_relation = self.config.relation_weight > 0
            kept = self.aggregation(
                features[images],
                vision.relation.pooled(candidate["stride"], images) if use_relation else None,
                candidate["stride"],
                candidate["clusters"],
                grid=vision.grid,
                top_k=candidate["keep"],
            )
            tokens[images, : candidate["keep"]] = kept.tokens
            mask[images, : candidate["keep"]] = kept.mask
            cluster_map[images] = kept.assignment
            scores[images, : candidate["keep"]] = kept.scores
        return tokens, mask, cluster_map, scores

    @torch.no_grad()
    def explain(
        self,
        pixel_values: torch.FloatTensor,
        input_ids: torch.LongTensor | None = None,
        question_input_ids: torch.LongTensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        granularity: str | int | Sequence | torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GranulonVisualOutput:
        """What would be chosen and seen, without generating: levels, clusters and their scores.

        Takes the processor's output as it is; without `input_ids` every image is a row of its own.
        """
        if input_ids is None:
            images_per_row = [1] * len(pixel_values)
        else:
            images_per_row = self._layout(input_ids == self.config.image_token_id, pixel_values).images_per_row
        return self.encode_images(
            pixel_values, images_per_row, question_input_ids, question_attention_mask, granularity
        )[0]

    def _layout(self, placeholder_BT: torch.Tensor, pixel_values: torch.Tensor, view: str | None = None):
        height, width = patch_grid(self.config.vision_config, pixel_values)
        return slot_layout(placeholder_BT, len(pixel_values), height * width, self.config.max_semantic_tokens, view)

    def place_images(
        self, placeholder_BT: torch.Tensor, pixel_values: torch.FloatTensor, visual_view=None, **question
    ) -> tuple[GranulonVisualOutput, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image tokens in the order of each row's placeholders.

        Returns:
            the visual output, image_embeds (B,R,E), visible (B,R) bool, which is False on empty slots and on those
            that `visual_view` hides, and role (B,R).
        """
        if visual_view is not None and visual_view not in (*VIEWS, "auto"):
            raise ValueError(f"visual_view is {visual_view!r}; choose one of {(*VIEWS, 'auto')}")
        layout = self._layout(placeholder_BT, pixel_values, visual_view)
        visual, _ = self.encode_images(pixel_values, layout.images_per_row, **question)
        tokens_INE = visual.image_hidden_states
        used_INK = torch.ones(tokens_INE.shape[:2], dtype=torch.bool, device=tokens_INE.device)
        if visual.semantic_mask is not None:
            slots = visual.semantic_mask.shape[1]
            mask_IK = visual.semantic_mask.to(tokens_INE.device)
            used_INK[:, used_INK.shape[1] - slots :] = mask_IK.gather(1, kept_last(mask_IK))
        index_BR, role_BR = layout.index_BR.to(tokens_INE.device), layout.role_BR.to(tokens_INE.device)
        visible_BR = used_INK.flatten()[index_BR] & (role_BR > 0)
        if visual_view is not None:
            visible_BR &= visible_roles(role_BR, self._views(visual_view, visual.granularity_index, len(role_BR)))
            if (visible_BR.any(-1) < (role_BR > 0).any(-1)).any():
                raise ValueError(
                    f"visual_view={visual_view!r} shows no image token of some row, whose prompt was made for another "
                    "view; call the processor without visual_view, or with the same one"
                )
        return visual, tokens_INE.flatten(0, 1)[index_BR], visible_BR, role_BR

    def _views(self, visual_view: str, index_B: torch.Tensor | None, num_rows: int) -> list[str]:
        """The view of each row; `"auto"` follows the chosen level's own."""
        if visual_view != "auto" or index_B is None:
            return [FULL if visual_view == "auto" else visual_view] * num_rows
        return [self.config.granularities[level]["view"] for level in index_B.tolist()]

    def placeholders(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Where the prompt holds image slots, (B,T) bool; embeddings are compared with the placeholder's own."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_embeds: torch.FloatTensor | None = None,
        question_input_ids: torch.LongTensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        granularity: str | int | Sequence | torch.Tensor | None = None,
        visual_view: str | None = None,
        joint_views: bool | Sequence[str] = False,
        predict: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GranulonModelOutputWithPast:
        """One pass over `[text before | N pixel | K semantic | text after]` (Eq. 8).

        Args:
            input_ids, attention_mask: (B,T), with the processor's placeholders. Padding may stand on either side.
            position_ids: (B,T); by default they skip padding and empty slots.
            pixel_values: (I,3,h,w), the images of all rows in the order of their placeholders.
            image_embeds: (B,R,E), image tokens already in the order of the placeholders (what `generate` passes); the
                attention mask then has to hide the empty slots.
            question_input_ids, question_attention_mask: (B,Tq), the question alone, right-padded.
            granularity: a level's name or index, for all rows or one per row, instead of the controller's choice.
            visual_view: "full", "pixel", "semantic" or "auto": masks the other slots of a full prompt. A prompt that
                the processor made for one view is read as such without it.
            joint_views: run the full, the pixel-only and the semantic-only prompt as one packed sequence (Eq. 9, 10);
                or the partial views that follow the full one, such as `("semantic",)`.
            predict: (B,L) long, places of prompt tokens: `last_hidden_state` is then (B,V*L,E), the states that
                predict these tokens, view after view, for a head that needs no others.

        When continuing from `past_key_values` by hand, pass the attention mask that hides the empty slots; `generate`
        does.

        Raises:
            ValueError: placeholders and images that do not fit, an unknown level or view, non-finite features.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if pixel_values is not None and image_embeds is not None:
            raise ValueError("pass pixel_values or image_embeds, not both")
        implementation = self.config.text_config._attn_implementation
        if joint_views and implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"joint_views needs a block mask, which {implementation!r} attention does not take; run one pass per "
                "visual_view instead, or load the model with attn_implementation='sdpa'"
            )
        placeholder_BT = self.placeholders(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        visual, role_BT = GranulonVisualOutput(), torch.zeros_like(placeholder_BT, dtype=torch.long)
        if pixel_values is not None:
            visual, image_embeds, visible_BR, role_BR = self.place_images(
                placeholder_BT,
                pixel_values,
                visual_view,
                question_input_ids=question_input_ids,
                question_attention_mask=question_attention_mask,
                granularity=granularity,
            )
            attention_mask = hide_slots(attention_mask, placeholder_BT, visible_BR)
            role_BT = slot_roles(placeholder_BT, role_BR.to(placeholder_BT.device))
        elif image_embeds is None and past_key_values is None:
            refuse_lone_placeholders(placeholder_BT)
            if self.training:
                inputs_embeds = inputs_embeds + self._idle_parts()
        if image_embeds is not None:
            image_embeds = image_embeds.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = torch.where(
                placeholder_BT.unsqueeze(-1), gather_slots(placeholder_BT, image_embeds), inputs_embeds
            )

        packed, partial_views = None, (PIXEL, SEMANTIC) if joint_views is True else tuple(joint_views or ())
        if partial_views:
            seen_BT = torch.ones_like(role_BT) if attention_mask is None else attention_mask
            packed = pack_views(role_BT, seen_BT, partial_views)
            inputs_embeds = take(inputs_embeds, packed.source_BP)
            attention_mask = self._packed_mask(packed.mask_BPP, inputs_embeds.dtype)
            position_ids = packed.position_ids_BP
        elif position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = positions(attention_mask)[:, -inputs_embeds.shape[1] :]

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        states = outputs.last_hidden_state
        if predict is not None:
            views = (FULL, *partial_views)
            before_BL = (predict - 1).clamp_min(0)
            places = [before_BL] if packed is None else [packed.predictors(predict, view) for view in views]
            states = take(states, torch.cat(places, dim=1).to(states.device))
        return GranulonModelOutputWithPast(
            last_hidden_state=states,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            packed_views=packed,
            **visual,
        )

    def _idle_parts(self) -> torch.Tensor:
        """Zero, by way of controller and projector: without images, a process reduces the gradients that others do."""
        zeros_11D = torch.zeros(1, 1, feature_width_of(self.config.vision_config), device=self.device)
        weights_1G = torch.ones(1, len(self.config.granularities), device=self.device)
        if self.granularity_controller is not None:
            ids_11 = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            states_11E = first_layer_states(self.language_model, ids_11, torch.ones_like(ids_11))
            weights_1G = self.granularity_controller(states_11E, torch.ones_like(ids_11)).softmax(-1)
        tokens = self.multi_modal_projector(zeros_11D, zeros_11D, weights_1G)
        return 0 * sum(group.sum() for group in tokens if group is not None)

    def _packed_mask(self, mask_BPP: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The packed sequence's mask in the form the language model's attention takes, (B,1,P,P)."""
        mask = mask_BPP.unsqueeze(1)
        if self.config.text_config._attn_implementation == "sdpa":
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


class GranulonForConditionalGeneration(GranulonPreTrainedModel, GranulonGenerationMixin):
    """`GranulonModel` with a language-model head: answers questions about images."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: GranulonConfig):
        super().__init__(config)
        self.model = GranulonModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> BaseModelOutputWithPooling:
        """See `GranulonModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def explain(self, pixel_values: torch.FloatTensor, **inputs) -> GranulonVisualOutput:
        """See `GranulonModel.explain`."""
        return self.model.explain(pixel_values, **inputs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_embeds: torch.FloatTensor | None = None,
        question_input_ids: torch.LongTensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        granularity: str | int | Sequence | torch.Tensor | None = None,
        visual_view: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GranulonCausalLMOutputWithPast:
        """As `GranulonModel.forward`, with logits and, given `labels` (B,T; -100 is ignored), the next-token loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_embeds=image_embeds,
            question_input_ids=question_input_ids,
            question_attention_mask=question_attention_mask,
            granularity=granularity,
            visual_view=visual_view,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            if outputs.packed_views is not None:
                labels = outputs.packed_views.labels(labels)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return GranulonCausalLMOutputWithPast(loss=loss, logits=logits, **rest)


GranulonModel.register_for_auto_class("AutoModel")
GranulonForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["GranulonForConditionalGeneration", "GranulonModel", "GranulonPreTrainedModel"]
