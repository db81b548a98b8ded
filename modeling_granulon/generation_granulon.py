"""Generation with images: they are encoded once, and a view shortens what is read, not what is returned."""

import torch
from transformers.generation import GenerationMixin

from .joint_views import compact, gather_slots, hide_slots, refuse_lone_placeholders, take


class GranulonGenerationMixin(GenerationMixin):
    """`generate` in all modes of transformers, for a head whose `model` is a `GranulonModel`."""

    def prepare_inputs_for_generation(
        self, input_ids, image_embeds=None, inputs_embeds=None, is_first_iteration=False, **kwargs
    ):
        """Image tokens go in with the prompt, once; without a cache, with every step."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            model_inputs["image_embeds"] = image_embeds
        return model_inputs

    def _get_candidate_generator(self, *, model_kwargs, **kwargs):
        """An assistant has no use for this model's image tokens: it drafts from the text, and drafts are verified."""
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != "image_embeds"}
        return super()._get_candidate_generator(model_kwargs=model_kwargs, **kwargs)

    @torch.no_grad()
    def generate(self, inputs: torch.LongTensor | None = None, visual_view: str | None = None, **kwargs):
        """Generate answers; the images are encoded once, whatever the decoding mode.

        Args:
            inputs: (B,T) prompt ids, also as `input_ids`; or `inputs_embeds` (B,T,E).
            pixel_values, question_input_ids, question_attention_mask, granularity: as in `forward`.
            visual_view: "full", "pixel", "semantic" or "auto" (each row as its level's `view` says). A full prompt is
                shortened before it is read; what is returned still starts with the prompt that was passed.
            kwargs: everything that `GenerationMixin.generate` takes, except `prefill_chunk_size`.

        Padding may stand on either side of the prompt. An `assistant_model` drafts from the text alone.

        Raises:
            ValueError: as `forward`; `prefill_chunk_size`; a cache that already holds a prompt, together with images.
        """
        pixel_values = kwargs.pop("pixel_values", None)
        question = {
            name: kwargs.pop(name, None) for name in ("question_input_ids", "question_attention_mask", "granularity")
        }
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if pixel_values is None:
            drafts = getattr(kwargs.get("generation_config"), "is_assistant", False)
            if input_ids is not None and kwargs.get("image_embeds") is None and not drafts:
                refuse_lone_placeholders(self.model.placeholders(input_ids, None))
            return super().generate(inputs=input_ids, **kwargs)
        _refuse_unsafe_generation(kwargs, self.generation_config)

        inputs_embeds = kwargs.pop("inputs_embeds", None)
        placeholder_BT = self.model.placeholders(input_ids, inputs_embeds)
        _, image_embeds, visible_BR, _ = self.model.place_images(placeholder_BT, pixel_values, visual_view, **question)
        mask_BT = hide_slots(kwargs.pop("attention_mask", None), placeholder_BT, visible_BR)
        if inputs_embeds is not None:
            slots_BTE = gather_slots(placeholder_BT, image_embeds.to(inputs_embeds))
            inputs_embeds = torch.where(placeholder_BT.unsqueeze(-1), slots_BTE, inputs_embeds)
        prompt_ids, length = input_ids, placeholder_BT.shape[1]
        if visual_view is not None or not mask_BT[:, -1].all():
            # Only what is seen moves on: the prompt is shorter, and padding stands at its left.
            index_BL, mask_BT = compact(mask_BT.bool(), pad_left=True)
            if prompt_ids is not None:
                prompt_ids = take(prompt_ids, index_BL).masked_fill(~mask_BT, self._padding_id())
            if inputs_embeds is not None:
                inputs_embeds = take(inputs_embeds, index_BL)
            image_embeds = take(image_embeds, compact(visible_BR)[0])
            _lower_length_limits(kwargs, self.generation_config, length - mask_BT.shape[1])
        if inputs_embeds is None:
            kwargs["image_embeds"] = image_embeds
        else:
            kwargs["inputs_embeds"] = inputs_embeds
        output = super().generate(inputs=prompt_ids, attention_mask=mask_BT.long(), **kwargs)
        return output if input_ids is None else _with_prompt(output, input_ids, mask_BT.shape[1])

    def _padding_id(self) -> int:
        """A token id for masked places that is no image placeholder."""
        pad = self.generation_config.pad_token_id
        return pad if pad is not None and pad != self.config.image_token_id else int(self.config.image_token_id == 0)


def _refuse_unsafe_generation(kwargs: dict, generation_config):
    generation_config = kwargs.get("generation_config") or generation_config
    if kwargs.get("prefill_chunk_size") or generation_config.prefill_chunk_size:
        raise ValueError("prefill_chunk_size would place image tokens wrongly; leave it unset for prompts with images")
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            "a cache from an earlier turn cannot be used again with images, since a new question changes the image "
            "tokens; pass the whole conversation without past_key_values"
        )


def _lower_length_limits(kwargs: dict, generation_config, removed: int):
    """max_length and min_length count the prompt that was passed, not the shorter one that is read."""
    for name in ("max_length", "min_length"):
        limit = kwargs.get(name) or getattr(kwargs.get("generation_config") or generation_config, name, None)
        if limit:
            kwargs[name] = max(limit - removed, 0)


def _with_prompt(output, input_ids: torch.Tensor, read_length: int):
    """The generated sequences behind the prompt that was passed, whatever part of it was read."""
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    prompts = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0).to(sequences.device)
    sequences = torch.cat([prompts, sequences[:, read_length:]], dim=1)
    if isinstance(output, torch.Tensor):
        return sequences
    output.sequences = sequences
    return output
