"""Generation with images, which are encoded once, and which clusters of the images carried an answer."""

import torch
from transformers.generation import GenerationMixin

from .image_tokens import SEMANTIC, check_images_present, compact, hide_slots, insert_slots, take


class GranulonGenerationMixin(GenerationMixin):
    """`generate` in all modes of transformers, for a head whose `model` is a `GranulonModel`.

    transformers' own `mm_encoder_outputs` runs after masks and positions are made. Here the level decides which places
    of the prompt are seen, so the images are encoded before.
    """

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
        """An assistant cannot use this model's image tokens: it drafts from the text, and drafts are verified."""
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != "image_embeds"}
        return super()._get_candidate_generator(model_kwargs=model_kwargs, **kwargs)

    @torch.no_grad()
    def generate(self, inputs: torch.LongTensor | None = None, visual=None, visual_view: str | None = None, **kwargs):
        """Generate answers; the images are encoded once, whatever the decoding mode.

        Args:
            inputs: (B,T) prompt ids, also as `input_ids`; or `inputs_embeds` (B,T,E).
            visual: what `encode` returned for these prompts, in place of the pixel values.
            visual_view: "full", "pixel", "semantic" or "auto" (each row as its level's `view` says), the default for a
                full prompt, which is shortened before it is read; what is returned still starts with the prompt that
                was passed.
            kwargs: `pixel_values`, `question_input_ids`, `question_attention_mask` and `granularity` as in `forward`,
                and everything that `GenerationMixin.generate` takes, except `prefill_chunk_size`.

        Padding may stand on either side of the prompt; without an attention mask, padding tokens are left out. An
        `assistant_model` drafts from the text alone. With `return_dict_in_generate=True` the output has `visual`.

        Raises:
            ValueError: as `forward`; `prefill_chunk_size`; a cache that already holds a prompt, together with images.
        """
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        question = [
            kwargs.pop(name, None) for name in ("question_input_ids", "question_attention_mask", "granularity")
        ]
        pixel_values = kwargs.pop("pixel_values", None)
        if pixel_values is None and visual is None:
            is_draft = getattr(kwargs.get("generation_config"), "is_assistant", False)
            if input_ids is not None and kwargs.get("image_embeds") is None and not is_draft:
                check_images_present(self.model.placeholders(input_ids, None))
            return super().generate(inputs=input_ids, **kwargs)
        _check_generation(kwargs, self.generation_config)

        inputs_embeds = kwargs.pop("inputs_embeds", None)
        placeholder_BT = self.model.placeholders(input_ids, inputs_embeds)
        layout = self.model.layout(placeholder_BT, pixel_values, visual, visual_view)
        if visual is None:
            visual = self.model._encode(pixel_values, layout.images_per_row, question, every_level=False)
        if visual_view is None and layout.is_full:
            visual_view = "auto"
        placed = visual.place(layout, visual_view)
        mask_BT = kwargs.pop("attention_mask", None)
        mask_BT = self._padding_mask(input_ids) if mask_BT is None else mask_BT
        mask_BT = hide_slots(mask_BT, placeholder_BT, placed.visible_BR)

        # Only what is seen is read: the prompt gets shorter, and padding stands at its left.
        index_BL, mask_BT = compact(mask_BT.bool(), pad_left=True)
        removed = placeholder_BT.shape[1] - index_BL.shape[1]
        prompt_ids = None if input_ids is None else take(input_ids, index_BL).masked_fill(~mask_BT, self._padding_id())
        if inputs_embeds is None:
            kwargs["image_embeds"] = take(placed.embeds_BRE, compact(placed.visible_BR)[0])
        else:
            kwargs["inputs_embeds"] = take(insert_slots(inputs_embeds, placeholder_BT, placed.embeds_BRE), index_BL)
        _lower_length_limits(kwargs, self.generation_config, removed)
        output = super().generate(inputs=prompt_ids, attention_mask=mask_BT.long(), **kwargs)
        return _complete(output, input_ids, mask_BT.shape[1], visual)

    @torch.no_grad()
    def evidence(
        self, input_ids: torch.LongTensor, visual, answer_ids: torch.LongTensor, attention_mask=None, **inputs
    ) -> dict:
        """Which clusters carried an answer: how much less likely it is without the semantic token of each.

        One batch of semantic views: a row with every semantic token, and one per cluster in which its token is hidden
        as an empty slot is. The encoder does not run again. In the full view, the pixel tokens could tell the same.

        Args:
            input_ids, attention_mask: (1,T), the prompt of the answer. Other outputs of the processor are not used.
            visual: what `encode` returned for this prompt.
            answer_ids: (A,) or (1,A) long, the generated tokens; those that end or pad an answer are not counted.

        Returns:
            log_likelihood: of the answer with every semantic token, in nats.
            clusters: a dict for each cluster of each image, sorted by nats, most first: image (place among the
                prompt's images, from 0), number (of the cluster in its image, from 1, as in `describe`), nats (the
                log-likelihood that is lost without it; negative where the answer gets likelier).

        Raises:
            ValueError: several prompts, a model without levels, a prompt without semantic slots, an empty answer.
        """
        if len(input_ids) != 1 or len(visual.images_per_row) != 1:
            raise ValueError(f"evidence takes one prompt, found {len(input_ids)}; pass the rows one by one")
        if visual.semantic_mask is None:
            raise ValueError("a model without levels of granularity has no clusters; take one with granularities")
        answer_A = self._answer_tokens(answer_ids.reshape(-1).to(input_ids.device))
        placeholder_BT = self.model.placeholders(input_ids, None)
        placed = visual.place(self.model.layout(placeholder_BT, visual=visual, visual_view=SEMANTIC), SEMANTIC)
        mask_BT = self._padding_mask(input_ids) if attention_mask is None else attention_mask
        mask_BT = hide_slots(mask_BT, placeholder_BT, placed.visible_BR)

        # What is seen of the prompt, then the answer: one row with every token (the first) and C rows without one.
        prompt_BL = take(input_ids, compact(mask_BT.bool())[0])
        hidden_C = self.model.placeholders(prompt_BL, None)[0].nonzero().squeeze(-1)
        row_C = torch.arange(1, len(hidden_C) + 1, device=hidden_C.device)
        ids_RS = torch.cat([prompt_BL[0], answer_A]).expand(len(hidden_C) + 1, -1)
        mask_RS = torch.ones_like(ids_RS).index_put((row_C, hidden_C), torch.zeros_like(row_C))
        place_RA = torch.arange(prompt_BL.shape[1], ids_RS.shape[1], device=ids_RS.device).expand(len(ids_RS), -1)
        image_BCE = take(placed.embeds_BRE, compact(placed.visible_BR)[0])
        states_RAE = self.model(
            input_ids=ids_RS,
            attention_mask=mask_RS,
            image_embeds=image_BCE.expand(len(ids_RS), -1, -1),
            predict=place_RA,
            use_cache=False,
        ).last_hidden_state
        # Row by row: the logits of all rows at once would need gigabytes for a long answer.
        nats = [
            -torch.nn.functional.cross_entropy(self.lm_head(states_AE).float(), answer_A, reduction="sum").item()
            for states_AE in states_RAE
        ]
        # An image's used slots stand in the order of its clusters.
        used_I = visual.semantic_mask.sum(-1).tolist()
        names = [(image, number) for image, used in enumerate(used_I) for number in range(1, used + 1)]
        clusters = [
            {"image": image, "number": number, "nats": nats[0] - rest}
            for (image, number), rest in zip(names, nats[1:], strict=True)
        ]
        clusters.sort(key=lambda cluster: (-cluster["nats"], cluster["image"], cluster["number"]))
        return {"log_likelihood": nats[0], "clusters": clusters}

    def _answer_tokens(self, answer_A: torch.LongTensor) -> torch.LongTensor:
        """An answer's tokens without those that end or pad it; raises ValueError for one that cannot be scored."""
        config = self.generation_config
        ends = [id for entry in (config.eos_token_id, config.pad_token_id) for id in _as_list(entry)]
        kept_A = answer_A[~torch.isin(answer_A, answer_A.new_tensor(ends))]
        if not len(kept_A) or self.model.placeholders(kept_A, None).any():
            found = "image tokens" if len(kept_A) else "no tokens"
            raise ValueError(f"the answer has {found}; pass the text tokens that were generated after the prompt")
        return kept_A

    def _padding_id(self) -> int:
        """A token id for masked places that is not the image placeholder."""
        pad = self.generation_config.pad_token_id
        return pad if pad is not None and pad != self.config.image_token_id else int(self.config.image_token_id == 0)

    def _padding_mask(self, input_ids: torch.LongTensor | None) -> torch.Tensor | None:
        """The mask of a prompt without one: no padding tokens; of a token that also ends turns, those at the left."""
        pad, eos = self.generation_config.pad_token_id, self.generation_config.eos_token_id
        if input_ids is None or pad is None:
            return None
        padding_BT = input_ids == pad
        if pad in _as_list(eos):
            padding_BT = padding_BT.long().cumprod(-1).bool()
        return (~padding_BT).long()


def _as_list(token_id: int | list[int] | None) -> list[int]:
    return [] if token_id is None else list(token_id) if isinstance(token_id, (list, tuple)) else [token_id]


def _check_generation(kwargs: dict, generation_config):
    """Raises ValueError for what would silently place image tokens wrongly."""
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
    for name in ("max_length", "min_length") if removed else ():
        limit = kwargs.get(name) or getattr(kwargs.get("generation_config") or generation_config, name, None)
        if limit:
            kwargs[name] = max(limit - removed, 0)


def _complete(output, input_ids: torch.Tensor | None, read_length: int, visual):
    """The output of upstream's generate, with the prompt that was passed in front and what was seen beside it."""
    is_tensor = isinstance(output, torch.Tensor)
    if input_ids is not None:
        sequences = output if is_tensor else output.sequences
        prompts = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0).to(sequences.device)
        sequences = torch.cat([prompts, sequences[:, read_length:]], dim=1)
        if is_tensor:
            return sequences
        output.sequences = sequences
    if not is_tensor:
        output.visual = visual
    return output
