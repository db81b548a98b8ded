"""Load a Granulon, open an image, answer questions: the one place for command line, server and evaluation."""

import base64
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from modeling_granulon import GranulonConfig, GranulonForConditionalGeneration, GranulonProcessor, load_rgb
from modeling_granulon.visual_output import GranulonVisualOutput

from .fetch import fetch
from .text import first_line

# Entries of a configuration, and weights by their shapes, that follow from its levels.
DERIVED_FROM_LEVELS = ("default_granularity", "max_semantic_tokens")
PROJECTOR = "model.multi_modal_projector."
LEVEL_WEIGHTS = ("model.granularity_controller.", f"{PROJECTOR}gain_offsets", f"{PROJECTOR}level_embedding")
LEVEL_WEIGHTS += (f"{PROJECTOR}cluster_embedding",)
SHORTEST_BASE64 = 64  # characters; no image file is smaller


def read_config(name: str | Path, revision: str = "main") -> dict:
    """
    The values of a Granulon's configuration, from a folder or a Hub repository.

    Raises:
        ValueError: there is no Granulon under this name.
    """
    try:
        values, _ = GranulonConfig.get_config_dict(name, revision=revision)
    except OSError as error:
        raise ValueError(f"{name} was not found locally or on the Hub: {first_line(error)}") from error
    if (found := values.get("model_type")) != GranulonConfig.model_type:
        expected = f"{name} is a model of type {found!r}, expected {GranulonConfig.model_type!r}"
        raise ValueError(f"{expected}; granulon-assemble makes one of an encoder and a language model")
    return values


def load_model(
    name: str | Path,
    *,
    revision: str = "main",
    overrides: dict | None = None,
    new_levels: bool = False,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    device_map=None,
    quantization_config=None,
) -> GranulonForConditionalGeneration:
    """
    A Granulon in eval mode, from this package's own code.

    Args:
        name, revision: a folder or a Hub repository.
        overrides: changes of the configuration; levels derive their default and slot number anew.
        new_levels: gains, embeddings and controller may start anew where `overrides` change their shapes (training).
        dtype, attn_implementation, device_map, quantization_config: as in `from_pretrained`; a dtype may be given by
            name.

    Raises:
        ValueError: there is no Granulon under this name, an override is unknown, or weights are missing or have
            another shape.
    """
    values = read_config(name, revision)
    overrides = overrides or {}
    if unknown := overrides.keys() - GranulonConfig().to_dict().keys():
        raise ValueError(f"the configuration has no {', '.join(sorted(unknown))}; check the overrides")
    if "granularities" in overrides:
        values |= dict.fromkeys(DERIVED_FROM_LEVELS)
    model, report = GranulonForConditionalGeneration.from_pretrained(
        name,
        config=GranulonConfig.from_dict(values | overrides),
        revision=revision,
        dtype=getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype,
        attn_implementation=attn_implementation,
        device_map=device_map,
        quantization_config=quantization_config,
        ignore_mismatched_sizes=bool(overrides),
        output_loading_info=True,
    )
    absent = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    absent = sorted(key for key in absent if not (new_levels and key.startswith(LEVEL_WEIGHTS)))
    if absent:
        changed = f" with {json.dumps(overrides)}" if overrides else ""
        names = f"{', '.join(absent[:3])} ({len(absent)} in all) are missing or have another shape"
        remedy = "take a complete checkpoint, or keep the number of levels"
        raise ValueError(f"the weights of {name} do not fit its configuration{changed}: {names}; {remedy}")
    return model.eval()


def load_processor(name: str | Path, config: GranulonConfig, *, revision: str = "main") -> GranulonProcessor:
    """The checkpoint's processor, with as many semantic slots as the model has."""
    processor = GranulonProcessor.from_pretrained(name, revision=revision)
    processor.num_semantic_tokens = config.max_semantic_tokens
    return processor


def open_image(source, public_only: bool = False) -> Image.Image:
    """
    The image of a file, an http(s) address, a data URL, base64, bytes or a PIL image, as `load_rgb` returns it.

    Args:
        source: one of these, or as data sets store them: `{"bytes", "path"}` of which one may be None, a list of one.
        public_only: of addresses, fetch public ones alone (fetch.py).

    Raises:
        ValueError: it cannot be fetched, is larger than fetch.py allows, or is not a usable image.
    """
    if isinstance(source, (list, tuple)):
        if len(source) != 1:
            raise ValueError(f"a list of {len(source)} images, expected one")
        source = source[0]
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if source is None:
        raise ValueError("the image is missing: neither bytes nor a path are stored")
    if isinstance(source, str) and source.startswith("data:"):
        return load_rgb(base64.b64decode(source.partition(",")[2], validate=True))
    if isinstance(source, str) and len(source) >= SHORTEST_BASE64 and not os.path.exists(source):
        with suppress(ValueError):  # else a file that is missing, as load_rgb says
            source = base64.b64decode(source, validate=True)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return load_rgb(fetch(source, public_only))
    return load_rgb(source)


@dataclass
class Prompt:
    """Conversations as the model reads them, their images encoded once."""

    inputs: dict  # the processor's output, on the model's device
    visual: GranulonVisualOutput | None  # None without images


@torch.no_grad()
def encode(model, processor, conversations: list[list[dict]], granularity=None) -> Prompt:
    """
    Build the prompts of conversations and run tower, controller and aggregation once.

    Args:
        conversations: chats as `apply_chat_template` takes them; images as PIL images in `{"type": "image", "image":
            ...}`.
        granularity: a level by name or index, or a list with one for each conversation; None for the controller's.

    Raises:
        ValueError: an unknown level.
    """
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"padding": True}}
    inputs = processor.apply_chat_template(conversations, add_generation_prompt=True, **options)
    inputs = inputs.to(model.device, dtype=model.dtype)
    visual = model.explain(**inputs, granularity=granularity) if "pixel_values" in inputs else None
    return Prompt(inputs, visual)


def describe(model, prompt: Prompt, visual_view: str = "auto") -> list[dict]:
    """
    What was chosen and what is read, for each conversation: granularity, view, tokens and images as in
    `GranulonVisualOutput.describe`, with the text tokens of the prompt in `tokens["text"]`.
    """
    is_text_BT = (prompt.inputs["input_ids"] != model.config.image_token_id) & prompt.inputs["attention_mask"].bool()
    text_B = is_text_BT.sum(-1).tolist()
    nothing = {"granularity": None, "view": visual_view, "images": [], "tokens": {"pixel": 0, "semantic": 0}}
    rows = [nothing] * len(text_B) if prompt.visual is None else prompt.visual.describe(visual_view)
    return [row | {"tokens": {**row["tokens"], "text": text}} for row, text in zip(rows, text_B, strict=True)]


@torch.no_grad()
def generate(
    model, processor, prompt: Prompt, visual_view: str = "auto", streamer: BaseStreamer | None = None, **options
) -> tuple[list[str], list[torch.Tensor]]:
    """
    The answers to encoded conversations, and the tokens of each, without padding.

    Args:
        visual_view: "full", "pixel", "semantic" or "auto".
        options: of `model.generate`, such as `max_new_tokens`.
    """
    visual = {} if prompt.visual is None else {"visual": prompt.visual, "visual_view": visual_view}
    text = {name: prompt.inputs[name] for name in ("input_ids", "attention_mask")}
    output = model.generate(**text, **visual, streamer=streamer, **options)
    new = output[:, text["input_ids"].shape[1] :]
    answers = processor.batch_decode(new, skip_special_tokens=True)
    return [answer.strip() for answer in answers], [ids[ids != processor.tokenizer.pad_token_id] for ids in new]


def question_about(image, question: str) -> list[dict]:
    """A conversation of one user turn: an image and a question about it."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
