"""Text and images to model inputs: image placeholders, the question alone, and escaped control tokens."""

import base64
import os
import re
from collections import deque
from copy import copy
from functools import lru_cache
from os.path import commonprefix

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.image_utils import ImageInput
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .image_io import load_rgb

MEDIA_KEYS = ("image", "url", "path", "base64", "image_url")
ZERO_WIDTH_SPACE = "\u200b"
MASKS_KNOW_IMAGES = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 18)


class GranulonImagesKwargs(ImagesKwargs, total=False):
    visual_view: str


class GranulonProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: GranulonImagesKwargs
    _defaults = {}  # transformers 5.17 asks for the attribute


class GranulonProcessor(ProcessorMixin):
    r"""
    Prepares prompts with images for Granulon.

    Args:
        image_processor: resizes and normalises images; its output size must be a multiple of `patch_size`.
        tokenizer: of the language model; pads on the left from here on.
        patch_size (`int`): pixels per patch side of the vision tower.
        num_semantic_tokens (`int`): K_max, semantic slots per image (`config.max_semantic_tokens`).
        image_token (`str`): the placeholder, a token of the tokenizer (`config.image_token_id`).
        chat_template (`str`): renders messages whose content holds image and text parts.
        question_turns (`int`): how many of the latest user turns are the question, joined by line breaks.

    Called with `text` and `images` (PIL, numpy, torch, path, bytes, base64 or URL; nested per row, or flat in the
    order of the placeholders) it returns `input_ids`, `attention_mask` (B,T), `pixel_values` (I,3,h,w) and, with
    images, the right-padded `question_input_ids` and `question_attention_mask` (B,Tq): the latest user turns without
    template, images and answers. `visual_view="pixel"` or `"semantic"` makes the shorter prompt of that view.

    Raises:
        ValueError: a row whose placeholders and images differ in number, an unusable image, an unknown view.
    """

    valid_processor_kwargs = GranulonProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size: int = 16,
        num_semantic_tokens: int = 20,
        image_token: str = "<image>",
        chat_template: str | None = None,
        question_turns: int = 1,
    ):
        self.patch_size = patch_size
        self.num_semantic_tokens = num_semantic_tokens
        self.image_token = image_token
        self.question_turns = question_turns
        self._custom_templates = deque(maxlen=8)  # templates passed to apply_chat_template, latest first
        if type(question_turns) is not int or question_turns < 1:
            raise ValueError(f"question_turns is {question_turns!r}; choose a whole number of turns above 0")
        if image_token not in tokenizer.get_vocab():
            raise ValueError(f"image_token {image_token!r} is not in the tokenizer; add it or name a token that is")
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        tokenizer.padding_side = "left"
        self.auto_map = {"AutoProcessor": "processing_granulon.GranulonProcessor"}
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "question_input_ids", "question_attention_mask"]

    def __call__(self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs):
        """See the class; takes what every transformers processor takes (`padding`, `return_tensors`, ...)."""
        text = self._without_second_bos(text, kwargs)
        texts = [text] if isinstance(text, str) else text
        images = None if isinstance(images, (list, tuple)) and not any(map(_is_filled, images)) else images
        features = super().__call__(images=images, text=text, **kwargs)
        if images is not None and texts is not None:
            features.update(self.question_inputs(texts, features["input_ids"]))
        return features

    def apply_chat_template(self, conversation, chat_template=None, sanitize_control_tokens: bool = True, **kwargs):
        """Render (and, with `tokenize=True`, process) conversations, as upstream.

        With `sanitize_control_tokens` (the default) the texts of messages go through `escape_control_tokens`, so that
        they write neither turns nor placeholders, also where the rendered text is tokenized later.
        """
        if isinstance(chat_template, str) and chat_template not in (*self._templates(), *self._template_names()):
            self._custom_templates.appendleft(chat_template)
        if sanitize_control_tokens:
            conversation = _escape(conversation, self._control_tokens())
        output = super().apply_chat_template(conversation, chat_template, **kwargs)
        if kwargs.get("return_assistant_tokens_mask") and "pixel_values" in output and not MASKS_KNOW_IMAGES:
            raise ValueError(
                "transformers 5.17 misplaces the assistant masks of prompts with images; take 5.18 or newer, or train "
                "on prompts and completions"
            )
        return output

    def for_view(self, visual_view: str) -> "GranulonProcessor":
        """This processor, whose prompts have slots for one view alone unless a call names another."""

        class Kwargs(GranulonProcessorKwargs, total=False):
            _defaults = {"images_kwargs": {"visual_view": visual_view}}

        processor = copy(self)
        processor.valid_processor_kwargs = Kwargs
        return processor

    def escape_control_tokens(self, text: str) -> str:
        """The text with a zero-width space inside each control token, which is then read as plain text."""
        return _escape(text, self._control_tokens())

    def question(self, prompt: str) -> str:
        """The latest user turns of a rendered prompt, without its images; all of a prompt without chat turns."""
        special_tokens = tuple(self.tokenizer.special_tokens_map.items())
        marks = [_user_turn_marks(template, special_tokens) for template in self._templates()]
        # Of several templates, the one that rendered the prompt has the longest mark in it.
        found = [(start, end) for start, end in marks if start and start in prompt]
        turns = [prompt]
        if found:
            start, end = max(found, key=lambda mark: len(mark[0]))
            turns = [turn.partition(end)[0] if end else turn for turn in prompt.split(start)[1:]]
        turns = [turn.replace(self.image_token, " ").strip() for turn in turns[-self.question_turns :]]
        return "\n".join(turn for turn in turns if turn)

    def replace_image_token(self, image_inputs: dict, image_idx: int, visual_view: str = "full", **kwargs) -> str:
        """The span of placeholders of one processed image."""
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        return self.image_token * self._span_length(height, width, visual_view)

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        """As upstream, with every image opened by `load_rgb`."""
        if images is not None:
            images = _map_images(self._open_image, images)
        return super().prepare_inputs_layout(images=images, text=text, **kwargs)

    def validate_inputs(self, images=None, text=None, **kwargs):
        """Placeholders and images must agree in every row, not only in their sum."""
        if text is not None and all(isinstance(prompt, str) for prompt in text):
            _check_rows([prompt.count(self.image_token) for prompt in text], images)
        super().validate_inputs(images=_flat(images), text=text, **kwargs)

    def _process_images(self, images, visual_view: str = "full", **kwargs):
        images = _flat(images)
        processed = self.image_processor(images, **kwargs)
        spans = [self.replace_image_token(processed, index, visual_view) for index in range(len(images))]
        return processed, spans

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs) -> MultiModalData:
        """Placeholders per image for sizes given as (height, width), as the processor itself would make them."""
        if image_sizes is None:
            return MultiModalData()
        kwargs = self._merge_kwargs(self.valid_processor_kwargs, **kwargs)["images_kwargs"]
        spans = [self._process_images([Image.new("RGB", (w, h))], **kwargs)[1][0] for h, w in image_sizes]
        tokens = [span.count(self.image_token) for span in spans]
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * len(tokens))

    def _span_length(self, height: int, width: int, visual_view: str) -> int:
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"processed images are {height} x {width} pixels, which patches of {self.patch_size} do not divide; "
                "give the image processor a size that they do"
            )
        pixel, semantic = (height // self.patch_size) * (width // self.patch_size), self.num_semantic_tokens
        lengths = {"full": pixel + semantic, "pixel": pixel, "semantic": semantic}
        if visual_view not in lengths:
            raise ValueError(
                f"visual_view is {visual_view!r}; choose one of {tuple(lengths)} ('auto' is for generate)"
            )
        if visual_view == "semantic" and semantic in (0, pixel):
            raise ValueError(
                f"a prompt of {semantic} semantic slots is ambiguous for an image of {pixel} patches; make the full "
                "prompt and pass visual_view='semantic' to generate"
            )
        return lengths[visual_view]

    def _without_second_bos(self, text, kwargs):
        """A rendered prompt begins with the BOS token of its template, and the tokenizer would add another."""
        bos = self.tokenizer.bos_token
        merged = self._merge_kwargs(self.valid_processor_kwargs, **kwargs)["text_kwargs"]
        adds_bos = bos and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        if not adds_bos or not merged.get("add_special_tokens", True):
            return text
        if isinstance(text, str):
            return text.removeprefix(bos)
        is_batch = isinstance(text, (list, tuple)) and all(isinstance(prompt, str) for prompt in text)
        return [prompt.removeprefix(bos) for prompt in text] if is_batch else text

    def _open_image(self, image):
        if isinstance(image, (np.ndarray, torch.Tensor)):
            return _array_to_image(image)
        if isinstance(image, str) and image.startswith(("http://", "https://")):
            image = self.image_processor.fetch_images(image)
        elif isinstance(image, str) and not os.path.exists(image):
            image = _base64_bytes(image) or image
        return load_rgb(image)

    def _template_names(self) -> tuple[str, ...]:
        return tuple(self.chat_template) if isinstance(self.chat_template, dict) else ()

    def _templates(self) -> list[str]:
        """The processor's own templates and those that were passed to `apply_chat_template`."""
        own = self.chat_template.values() if isinstance(self.chat_template, dict) else [self.chat_template or ""]
        return [*own, *self._custom_templates]

    def _control_tokens(self) -> re.Pattern:
        """Matches special tokens and the added tokens that a template writes; single characters cannot be split."""
        templates = "".join(self._templates())
        tokens = {
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if len(token.content.strip()) > 1 and (token.special or token.content in templates)
        }
        longest_first = sorted(tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def question_inputs(self, prompts: list[str], like) -> dict:
        """Tokens and mask of the prompts' questions, right-padded, in the form of `like`: lists, numpy or torch."""
        ids = [self.tokenizer(self.question(prompt), add_special_tokens=False)["input_ids"] for prompt in prompts]
        width = max(1, *map(len, ids))
        pad = self.tokenizer.pad_token_id or 0
        padded = [row + [pad] * (width - len(row)) for row in ids]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in ids]
        keys = {"question_input_ids": padded, "question_attention_mask": mask}
        make = torch.tensor if isinstance(like, torch.Tensor) else np.array if isinstance(like, np.ndarray) else list
        return {name: make(rows) for name, rows in keys.items()}


@lru_cache(maxsize=32)
def _user_turn_marks(chat_template: str, special_tokens: tuple) -> tuple[str, str]:
    """What a chat template writes before and after a user turn, read off a rendered probe.

    Two empty strings for a template that cannot render two turns.
    """
    first, answer, second = "\u2460first\u2460", "\u2461answer\u2461", "\u2462second\u2462"
    turns = list(zip(("user", "assistant", "user"), (first, answer, second), strict=True))

    def render(as_parts: bool, add_generation_prompt: bool) -> str:
        conversation = [
            {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text} for role, text in turns
        ]
        try:
            return render_jinja_template(
                conversations=[conversation],
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                **dict(special_tokens),
            )[0][0]
        except Exception:  # templates run code of their own, which may raise anything
            return ""

    # A template that reads content as a list of parts finds nothing in a string.
    for as_parts in (False, True):
        asked, plain = render(as_parts, True), render(as_parts, False)
        if all(text in rendered for text in (first, answer, second) for rendered in (asked, plain)):
            break
    else:
        return "", ""
    before = [asked.partition(first)[0], asked.partition(answer)[2].partition(second)[0]]
    after = [asked.partition(first)[2].partition(answer)[0], asked.partition(second)[2], plain.partition(second)[2]]
    start = commonprefix([text[::-1] for text in before])[::-1]
    return start, commonprefix(after) or commonprefix(after[:2])


def _escape(value, control: re.Pattern):
    """The conversation with every control token in its texts split; media entries stay as they are."""
    if isinstance(value, str):
        while control.search(value):
            value = control.sub(lambda match: match[0][0] + ZERO_WIDTH_SPACE + match[0][1:], value)
        return value
    if isinstance(value, dict):
        return {key: entry if key in MEDIA_KEYS else _escape(entry, control) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return _separate_parts([_escape(entry, control) for entry in value], control)
    return value


def _separate_parts(parts: list, control: re.Pattern) -> list:
    """Text parts with a zero-width space between neighbours that, joined or trimmed, would make a control token."""
    written = trimmed = ""
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            written = trimmed = ""
            continue
        if control.search(written + part["text"]) or control.search(trimmed + part["text"].strip()):
            part["text"] = ZERO_WIDTH_SPACE + part["text"]
        written, trimmed = written + part["text"], trimmed + part["text"].strip()
    return parts


def _map_images(function, images):
    if isinstance(images, (list, tuple)):
        return [_map_images(function, image) for image in images]
    return function(images)


def _is_filled(row) -> bool:
    return not isinstance(row, (list, tuple)) or len(row) > 0


def _flat(images):
    """All images of the batch as one list, rows without any included."""
    if images is None:
        return None
    if isinstance(images, (list, tuple)):
        return [image for row in images for image in _flat(row)]
    is_batch = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
    return list(images) if is_batch else [images]


def _check_rows(counts: list[int], images):
    if images is None:
        images = []
    nested = isinstance(images, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in images)
    if nested and len(images) != len(counts):
        raise ValueError(
            "the placeholder tokens in the prompts should be the same as the number of images in each, found "
            f"{len(images)} lists of images for {len(counts)} prompts; pass one list per prompt"
        )
    for row, count in enumerate(counts if nested else []):
        if count != len(images[row]):
            raise ValueError(
                f"row {row} has {count} image placeholders but {len(images[row])} images; give each its image"
            )
    if not nested and sum(counts) != len(_flat(images)):
        raise ValueError(
            f"the prompts have {counts} image placeholders, {sum(counts)} in all, but {len(_flat(images))} images "
            "were passed; pass one image per placeholder, nested by prompt"
        )


def _base64_bytes(text: str) -> bytes | None:
    """The bytes of a base64 string or data URL; None for any other text."""
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except ValueError:
        return None


def _array_to_image(array):
    """A uint8 array or tensor of 1, 3 or 4 channels as an image; others are left to the image processor."""
    pixels = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else array
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        return array
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4) and pixels.shape[-1] not in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)  # (C,h,w) -> (h,w,C)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim == 3 and pixels.shape[-1] not in (3, 4):
        raise ValueError(f"an image array has shape {tuple(array.shape)}; expected 1, 3 or 4 channels, first or last")
    return load_rgb(Image.fromarray(np.ascontiguousarray(pixels)))


GranulonProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["GranulonProcessor"]
