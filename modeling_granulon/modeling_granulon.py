"""Granulon: a frozen pixel-level tower, a question that picks the granularity, and one language-model pass.

Equations are those of docs/method.md. Shapes: B rows of text, T tokens, I images, J images of the rows (I, unless rows
share images), H x W patch grid, N = H * W patches, K semantic slots (K_max), R image slots of a row, D vision width,
E text width, G granularities, V packed views.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_granulon import GranulonConfig
from .generation_granulon import GranulonGenerationMixin
from .granularity_controller import GranularityController, choose_granularity, question_states
from .image_tokens import (
    HIDDEN_ROLE,
    PIXEL,
    SEMANTIC,
    PlacedImages,
    Prompt,
    SlotLayout,
    check_images_present,
    positions,
    slot_layout,
    slot_roles,
    take,
    without_hidden,
)
from .joint_views import PACKABLE, PackedViews, PartialView, pack_views
from .multi_modal_projector import GEOMETRY
from .vision_features import feature_width_of, patch_grid
from .visual_encoder import GranulonPreTrainedModel, GranulonVisualEncoder, check_finite
from .visual_output import (
    CONTROLLER,
    DEFAULT,
    REQUEST,
    SETTING,
    GranulonCausalLMOutputWithPast,
    GranulonModelOutputWithPast,
    GranulonVisualOutput,
)


class GranulonModel(GranulonVisualEncoder):
    """Tower, controller, aggregation, projector and decoder, without a head.

    Build it with `GranulonConfig`; load it with `AutoModel.from_pretrained(..., trust_remote_code=True)`.

    Arguments of `forward`:
        input_ids, attention_mask: (B,T), with the processor's placeholders. Padding may stand on either side.
        position_ids: (B,T); by default they skip padding and empty slots.
        pixel_values: (I,3,h,w), the images of all rows in the order of their placeholders.
        visual: what `encode` returned for these rows, in place of pixel_values.
        image_embeds: (B,R,E), image tokens already in the order of the placeholders (what `generate` passes); the
            attention mask then has to hide the empty slots.
        question_input_ids, question_attention_mask: (B,Tq), the question alone, right-padded.
        granularity: a level's name or index, for all rows or one per row, instead of the controller's choice.
        visual_view: "full", "pixel", "semantic" or "auto": masks the other slots of a full prompt. A prompt that the
            processor made for one view is read as such without it.
        joint_views: partial views that follow the full one in one packed sequence (Eq. 9, 10): "pixel", "semantic"
            (the semantic tokens of the acting level), or the name of a level (its semantic tokens). True stands for
            "pixel" and every level.
        predict: (B,L) long, places of prompt tokens: `last_hidden_state` is then (B,V*L,E), the states that predict
            these tokens, view after view, for a head that needs no others.

    To continue from `past_key_values` by hand, pass the attention mask that hides the empty slots, as `generate` does.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: GranulonConfig):
        super().__init__(config)
        # CLIP and SigLIP name layers of their text towers too, for which sharding would look in vain.
        self._no_split_modules = set(self._no_split_modules) & {type(module).__name__ for module in self.modules()}

    def add_decoder(self, config: GranulonConfig):
        self.language_model = AutoModel.from_config(config.text_config)
        levels = len(config.granularities)
        self.granularity_controller = (
            GranularityController(
                config.text_config.hidden_size, config.controller_hidden_size, levels, config.projector_hidden_act
            )
            if levels > 1 and config.controller == "learned"
            else None
        )

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def encode(
        self,
        pixel_values: torch.FloatTensor,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        question_input_ids: torch.LongTensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        granularity: str | int | Sequence | torch.Tensor | None = None,
        every_level: bool = False,
        image_index: torch.LongTensor | None = None,
    ) -> GranulonVisualOutput:
        """Images and the questions of their rows become image tokens: Eq. 1-8 up to the language model.

        Takes the processor's output as it is. Pass the result as `visual` to `forward` or `generate`, as often as you
        like: tower, controller, aggregation and projector do not run again.

        Args:
            pixel_values: (I,3,h,w), h and w multiples of the patch size, the images of all rows in order.
            input_ids: (B,T), which says how many images each row has; without it every image is a row of its own.
            attention_mask: not used.
            question_input_ids, question_attention_mask: (B,Tq), 1 on question tokens; a row without any takes the
                default granularity.
            granularity: name or index for all rows, or one per row, instead of the controller's choice; None leaves
                the choice to the controller.
            every_level: also compute the semantic tokens of the levels that were not chosen (`level_hidden_states`).
            image_index: (J,) long, which of `pixel_values` each of the rows' images is, where rows share images; by
                default every image is there once.

        Raises:
            ValueError: placeholders and images that do not fit, an unknown level, features that are not finite.
        """
        images = len(pixel_values) if image_index is None else len(image_index)
        if input_ids is None:
            images_per_row = [1] * images
        else:
            placeholder_BT = input_ids == self.config.image_token_id
            images_per_row = self.layout(placeholder_BT, pixel_values, images=images).images_per_row
        question = question_input_ids, question_attention_mask, granularity
        return self._encode(pixel_values, images_per_row, question, every_level, image_index)

    @torch.no_grad()
    def explain(self, pixel_values: torch.FloatTensor, **inputs) -> GranulonVisualOutput:
        """`encode` without gradients: levels, clusters and their scores, nothing generated."""
        return self.encode(pixel_values, **inputs)

    def _encode(
        self, pixel_values, images_per_row: list[int], question: tuple, every_level: bool, image_index_J=None
    ) -> GranulonVisualOutput:
        vision = self._vision(pixel_values)
        if image_index_J is None:
            image_index_J = torch.arange(len(pixel_values))
        image_index_J = image_index_J.to(vision.features.device)
        count_B = torch.tensor(images_per_row)
        finite_I = vision.features.isfinite().flatten(1).all(-1)
        if not self.config.granularities:
            check_finite(finite_I.tolist())
            tokens_JSE = self.multi_modal_projector(vision.features[image_index_J])
            return GranulonVisualOutput.of(self.config, image_hidden_states=tokens_JSE, images_per_row=count_B)

        logits_BG, index_B, chosen_B = self.choose_levels(len(images_per_row), *question, vision.features.device)
        level_J = index_B.repeat_interleave(count_B.to(index_B.device), output_size=len(image_index_J))
        # The level decides how many tokens there are, so it is read on the host, here and once.
        levels, finite = torch.stack([level_J, finite_I[image_index_J].long()]).tolist()
        check_finite(finite)
        pixel_JNE = self.multi_modal_projector(vision.features[image_index_J], level_J)
        return GranulonVisualOutput.of(
            self.config,
            **self._semantic_slots(vision, pixel_JNE, levels, every_level, image_index_J),
            granularity_logits=logits_BG,
            granularity_index=index_B,
            chosen_by=chosen_B,
            images_per_row=count_B,
        )

    def question_logits(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The controller's logits (B,G) of questions (B,T) (Eq. 2, 3).

        The decoder's layers are read without gradients: what trains the controller does not pull them.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with torch.no_grad():
            states_BTE = question_states(self.language_model, input_ids, attention_mask, self.config.controller_layers)
        return self.granularity_controller(states_BTE, attention_mask.to(states_BTE.device))

    def choose_levels(self, num_rows, question_input_ids, question_attention_mask, granularity, device):
        """The level of each row or question (Eq. 1-3): the request's, else the controller's, else the default.

        Returns:
            logits (B,G) or None, index (B,) long, and who chose it (B,) long, one of visual_output's codes.
        """
        config, logits_BG = self.config, None
        requested_B = self._requested_levels(num_rows, granularity).to(device)
        if config.controller == "random":
            fallback_B, source = torch.randint(len(config.granularities), (num_rows,)).to(device), SETTING
        else:
            learned = config.controller == "learned"
            name, source = (config.default_granularity, DEFAULT) if learned else (config.controller, SETTING)
            fallback_B = torch.full((num_rows,), config.granularity_index(name), device=device)
        index_B = torch.where(requested_B >= 0, requested_B, fallback_B)
        chosen_B = torch.where(requested_B >= 0, REQUEST, source)
        if self.granularity_controller is not None and question_input_ids is not None:
            if len(question_input_ids) != num_rows:
                raise ValueError(f"{len(question_input_ids)} questions for {num_rows} prompts; pass one per prompt")
            if question_attention_mask is None:
                question_attention_mask = torch.ones_like(question_input_ids)
            logits_BG = self.question_logits(question_input_ids, question_attention_mask)
            decides_B = question_attention_mask.any(-1).to(device) & (requested_B < 0)
            index_B = choose_granularity(logits_BG.to(device), torch.where(decides_B, -1, index_B))
            chosen_B = torch.where(decides_B, CONTROLLER, chosen_B)
        return logits_BG, index_B, chosen_B

    def _requested_levels(self, num_rows: int, granularity) -> torch.Tensor:
        """(B,) long, -1 where the request names no level."""
        if isinstance(granularity, torch.Tensor):
            granularity = granularity.tolist()
        if granularity is None or isinstance(granularity, str) or not hasattr(granularity, "__len__"):
            granularity = [granularity] * num_rows
        if len(granularity) != num_rows:
            raise ValueError(f"{len(granularity)} granularities for {num_rows} rows; pass one, or one per row")
        return torch.tensor([-1 if level is None else self.config.granularity_index(level) for level in granularity])

    def placeholders(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Where the prompt holds image slots, (B,T) bool; embeddings are compared with the placeholder's own."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def layout(
        self, placeholder_BT: torch.Tensor, pixel_values=None, visual=None, visual_view: str | None = None, images=None
    ) -> SlotLayout:
        """Which placeholder takes which image token, for images that are given as pixels or already encoded.

        images: how many there are, if rows share the `pixel_values`.
        """
        slots = self.config.max_semantic_tokens
        if visual is not None:
            images, num_pixel = visual.image_hidden_states.shape[0], visual.image_hidden_states.shape[1] - slots
        else:
            height, width = patch_grid(self.config.vision_config, pixel_values)
            images, num_pixel = len(pixel_values) if images is None else images, height * width
        return slot_layout(placeholder_BT, images, num_pixel, slots, visual_view)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        visual: GranulonVisualOutput | None = None,
        image_embeds: torch.FloatTensor | None = None,
        question_input_ids: torch.LongTensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        granularity: str | int | Sequence | torch.Tensor | None = None,
        visual_view: str | None = None,
        joint_views: bool | Sequence[str] = False,
        predict: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GranulonModelOutputWithPast:
        """One pass over `[text before | N pixel | K semantic | text after]` (Eq. 8); arguments as the class says.

        Raises:
            ValueError: placeholders and images that do not fit, an unknown level or view, non-finite features.
        """
        views = self._partial_views(joint_views, visual_view)
        _check_inputs((input_ids, inputs_embeds), (pixel_values, visual, image_embeds))
        placeholder_BT = self.placeholders(input_ids, inputs_embeds)

        question = question_input_ids, question_attention_mask, granularity
        layout, visual = self._look(placeholder_BT, pixel_values, visual, visual_view, views, question)
        placed = PlacedImages(image_embeds) if visual is None else visual.place(layout, visual_view)
        if visual is None and image_embeds is None and past_key_values is None:
            check_images_present(placeholder_BT)
        # Controller and projector run before the text is embedded, with images and without: FSDP2 and DeepSpeed
        # exchange weights and gradients in the order in which parts run, which has to be that of every process.
        zero = self._zero_loss_for_ddp(visual) if self.training else None
        text_BTE = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        text_BTE = text_BTE if zero is None else text_BTE + zero
        prompt = Prompt(placeholder_BT, text_BTE, attention_mask)
        if views:
            packed, embeds, attention_mask, position_ids = self._pack(views, prompt, visual, layout, placed)
        else:
            packed, embeds, attention_mask = None, *prompt.insert(placed)
            if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
                position_ids = positions(attention_mask)[:, -embeds.shape[1] :]
            if (
                predict is not None and attention_mask is not None and attention_mask.dim() == 2
            ):  # hidden slots and padding would cost their share
                embeds, position_ids, attention_mask, predict = without_hidden(
                    embeds, position_ids, attention_mask, predict
                )
        outputs = self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return GranulonModelOutputWithPast(
            last_hidden_state=_predicting_states(outputs.last_hidden_state, predict, packed),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            packed_views=packed,
            **(visual or {}),
        )

    def _look(self, placeholder_BT, pixel_values, visual, visual_view, views: tuple[str, ...], question: tuple):
        """Where each image token goes, and what was seen: encoded before, or now; (None, None) without images."""
        if pixel_values is None and visual is None:
            return None, None
        layout = self.layout(placeholder_BT, pixel_values, visual, visual_view)
        if visual is None:
            every_level = any(view in self.config.granularity_names for view in views)
            visual = self._encode(pixel_values, layout.images_per_row, question, every_level)
        return layout, visual

    def _partial_views(self, joint_views: bool | Sequence[str], visual_view: str | None) -> tuple[str, ...]:
        """The partial views of a packed pass, by name; raises ValueError for those that cannot be packed."""
        known = PIXEL, SEMANTIC, *self.config.granularity_names
        views = known[:1] + known[2:] if joint_views is True else tuple(joint_views or ())
        if not views:
            return views
        if set(views) - set(known) or visual_view is not None:
            raise ValueError(
                f"joint_views is {joint_views!r} and visual_view {visual_view!r}; joint_views takes names of {known} "
                "and goes without visual_view"
            )
        implementation = self.config.text_config._attn_implementation
        if implementation not in PACKABLE:
            raise ValueError(
                f"joint_views needs a block mask, which {implementation!r} attention does not take; run one pass per "
                "visual_view instead, or load the model with attn_implementation='sdpa'"
            )
        return views

    def _pack(self, views: tuple[str, ...], prompt: Prompt, visual, layout, placed: PlacedImages):
        """One sequence of the full prompts and their partial views: layout, embeddings, mask and positions."""
        embeds, mask_BT = prompt.insert(placed)
        role_BT, sources, partial = torch.zeros_like(prompt.placeholder_BT, dtype=torch.long), [embeds], []
        if layout is not None:
            role_BT = slot_roles(prompt.placeholder_BT, layout.role_BR.to(prompt.placeholder_BT.device))
        for view in views:
            view_embeds, view_mask_BT = embeds, mask_BT
            if visual is not None and view not in (PIXEL, SEMANTIC):
                level = self.config.granularity_index(view)
                view_embeds, view_mask_BT = prompt.insert(visual.at_level(level).place(layout))
            sources.append(view_embeds)
            partial.append(
                PartialView(HIDDEN_ROLE[PIXEL if view == PIXEL else SEMANTIC], _seen(view_mask_BT, role_BT))
            )
        packed = pack_views(role_BT, _seen(mask_BT, role_BT), partial)
        mask = packed.mask(self.config.text_config._attn_implementation, embeds.dtype)
        return packed, packed.embed(sources), mask, packed.position_ids_BP

    def _zero_loss_for_ddp(self, visual: GranulonVisualOutput | None) -> torch.Tensor:
        """A zero that depends on controller and projector: every process reduces their gradients, images or not.

        What the controller says of images that are there chooses levels and reaches no output otherwise.
        """
        total, level_1 = torch.zeros((), device=self.device), torch.zeros(1, dtype=torch.long, device=self.device)
        if self.granularity_controller is not None:
            logits = None if visual is None else visual.granularity_logits
            total = total + (self.question_logits(level_1.unsqueeze(0)) if logits is None else logits).sum()
        if visual is None:
            zeros_11D = torch.zeros(1, 1, feature_width_of(self.config.vision_config), device=self.device)
            total = total + self.multi_modal_projector(zeros_11D, level_1 if self.config.granularities else None).sum()
            if self.config.granularities:
                geometry_115 = zeros_11D.new_zeros(1, 1, GEOMETRY)
                total = total + self.multi_modal_projector(zeros_11D, level_1, geometry_115).sum()
        return 0 * total


class GranulonForConditionalGeneration(GranulonPreTrainedModel, GranulonGenerationMixin):
    """`GranulonModel` with a language-model head: answers questions about images."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: GranulonConfig):
        super().__init__(config)
        self.model = GranulonModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        self._no_split_modules = self.model._no_split_modules

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> BaseModelOutputWithPooling:
        """See `GranulonVisualEncoder.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def encode(self, pixel_values: torch.FloatTensor, **inputs) -> GranulonVisualOutput:
        """See `GranulonModel.encode`."""
        return self.model.encode(pixel_values, **inputs)

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
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GranulonCausalLMOutputWithPast:
        """As `GranulonModel.forward`, whose arguments it takes, with logits and, given `labels`, the next-token loss.

        Args:
            labels: (B,T) long; -100 is ignored. Not with `joint_views`, whose objective needs weights that the
                trainer has.
            logits_to_keep: logits of the last so many places, or of the named ones; 0 stands for all.

        Raises:
            ValueError: as `GranulonModel.forward`; labels together with `joint_views`.
        """
        if labels is not None and kwargs.get("joint_views"):
            raise ValueError("labels and joint_views do not go together; GranulonTrainer computes the joint objective")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return GranulonCausalLMOutputWithPast(loss=loss, logits=logits, **rest)


def _check_inputs(prompts: tuple, images: tuple):
    if sum(entry is not None for entry in prompts) != 1:
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    if sum(entry is not None for entry in images) > 1:
        raise ValueError("pass only one of pixel_values, visual and image_embeds")


def _seen(mask_BT: torch.Tensor | None, role_BT: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(role_BT) if mask_BT is None else mask_BT


def _predicting_states(states: torch.Tensor, predict_BL: torch.Tensor | None, packed: PackedViews | None):
    """The states that predict the given prompt tokens, (B,V*L,E), view after view; all states without `predict`."""
    if predict_BL is None:
        return states
    places = [(predict_BL - 1).clamp_min(0)]
    if packed is not None:
        places = [packed.predictors(predict_BL, view) for view in range(len(packed.widths))]
    return take(states, torch.cat(places, dim=1).to(states.device))


GranulonModel.register_for_auto_class("AutoModel")
GranulonForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["GranulonForConditionalGeneration", "GranulonModel", "GranulonPreTrainedModel"]
