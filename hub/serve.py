"""`granulon-serve`: the OpenAI-compatible server of `transformers serve`, for a Granulon.

`transformers serve` looks an architecture up on the `transformers` module and its task in a list of names, so Granulon
is added to both. A chat request may also name a level and a view in the fields `granularity` and `visual_view`.
Unusable requests get status 400. An image is a data URL or an http(s) address, never a file of the server.
"""

import asyncio
from contextvars import ContextVar

import transformers
import typer
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from huggingface_hub import CacheNotFound
from PIL import Image
from transformers.cli.serve import Serve
from transformers.cli.serving import chat_completion, model_manager, utils
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from modeling_granulon import GranulonForConditionalGeneration
from modeling_granulon.image_tokens import VISUAL_VIEWS

from .inference import open_image

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXTS, IMAGES = ("text", "input_text", "output_text"), ("image_url", "input_image")  # types of a message's parts
GENERATE_OPTIONS = ContextVar("generate_options")  # level and view of the request that this task answers
upstream_inputs = utils.BaseHandler.get_processor_inputs_from_messages
upstream_models = model_manager.ModelManager.get_gen_models


class GranulonRequest(chat_completion.TransformersCompletionCreateParamsStreaming, total=False):
    """A chat request with two more fields: a level (name or index) and a view."""

    granularity: str | int
    visual_view: str


class GranulonChatHandler(chat_completion.ChatCompletionHandler):
    """The chat endpoint, which passes level and view to `generate`."""

    _valid_params_class = GranulonRequest

    async def handle_request(self, body, request_id):
        """As upstream; an unusable image and an unknown level or view are refused in the form of OpenAI's errors."""
        try:
            self._validate_request(body)
            options = {name: body.pop(name) for name in ("granularity", "visual_view") if body.get(name) is not None}
            _, model, _ = self._resolve_model(body)
            _check_options(options, model.config)
            GENERATE_OPTIONS.set(options)
            # In a thread: downloading and decoding would block all other requests.
            body["messages"] = await asyncio.to_thread(_with_images, body.get("messages"))
            return await super().handle_request(body, request_id)
        except HTTPException as error:
            refusal = {"message": error.detail, "type": "invalid_request_error", "code": error.status_code}
            return JSONResponse({"error": refusal}, error.status_code)

    def _streaming(self, request_id, model, processor, model_id, inputs, *args, **kwargs):
        inputs = {**inputs, **GENERATE_OPTIONS.get()}
        return super()._streaming(request_id, model, processor, model_id, inputs, *args, **kwargs)

    def _non_streaming(self, request_id, model, processor, model_id, inputs, *args, **kwargs):
        inputs = {**inputs, **GENERATE_OPTIONS.get()}
        return super()._non_streaming(request_id, model, processor, model_id, inputs, *args, **kwargs)


def processor_inputs(messages, modality):
    """As upstream, with every image opened by `load_rgb`."""
    messages = _with_images(messages)
    try:
        conversation = upstream_inputs(messages, modality)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # the rest is checked already
        raise HTTPException(400, f"tool_calls: invalid, {type(error).__name__}: {error}") from error
    for message in conversation:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image":
                part["image"] = part.pop("url")
    return conversation


def open_part(source) -> Image.Image:
    """The RGB image of a data URL or an http(s) address, else HTTP 400; an open image is returned as it is."""
    if isinstance(source, Image.Image):
        return source
    try:
        if not str(source).startswith(("data:", "http://", "https://")):
            raise ValueError("an image is a data URL (data:image/png;base64,...) or an http(s) address")
        return open_image(str(source))
    except ValueError as error:
        raise HTTPException(400, f"image_url: {error}") from error


def _with_images(messages):
    """A copy of the messages with their images opened."""
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        needed = f"a list of at least one object with content and a role of {', '.join(ROLES)} is needed"
        raise HTTPException(400, f"messages: {needed}")
    return [
        {**message, "content": [_with_image(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _is_message(message):
    if not isinstance(message, dict) or message.get("role") not in ROLES:  # the role is written into the prompt
        return False
    content = message.get("content")
    return isinstance(content, (str, list)) or (content is None and "tool_calls" in message)


def _with_image(part):
    """A part of a message with its image opened; refused if upstream would silently leave it out."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXTS and isinstance(part.get("text"), str):
        return part
    if kind in IMAGES and part.get("image_url"):
        source = part["image_url"]
        return {**part, "image_url": open_part(source.get("url") if isinstance(source, dict) else source)}
    expected = f"a part is one of {', '.join(TEXTS + IMAGES)} with its text or image_url"
    raise HTTPException(400, f"messages: {expected}, found {str(part)[:80]}")


def _check_options(options, config):
    try:
        if "granularity" in options:
            config.granularity_index(options["granularity"])
    except ValueError as error:
        raise HTTPException(400, f"granularity: {error}") from error
    if (view := options.get("visual_view", "auto")) not in VISUAL_VIEWS:
        raise HTTPException(400, f"visual_view: {view!r} is none of {', '.join(VISUAL_VIEWS)}")


def listed_models(manager, cache_dir=None):
    """The model that the server was started with, which is the only one it serves; else the models in the cache."""
    if manager.force_model is not None:
        return [{"id": manager.force_model, "object": "model", "created": 0, "owned_by": ""}]
    try:
        return upstream_models(cache_dir)
    except CacheNotFound:  # there is no cache yet
        return []


def register():
    """Add Granulon to `transformers serve` in this process."""
    name = GranulonForConditionalGeneration.__name__
    setattr(transformers, name, GranulonForConditionalGeneration)
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["granulon"] = name
    chat_completion.ChatCompletionHandler = GranulonChatHandler
    utils.BaseHandler.get_processor_inputs_from_messages = staticmethod(processor_inputs)
    model_manager.ModelManager.get_gen_models = listed_models


def make_command():
    """The command with the options of `transformers serve`."""
    command = typer.Typer(add_completion=False)
    command.command(help=__doc__)(Serve)
    return command


def main():
    register()
    make_command()()


if __name__ == "__main__":
    main()
