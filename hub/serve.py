"""`granulon-serve`: the OpenAI-compatible server of `transformers serve`, for one Granulon.

`transformers serve` looks an architecture up on the `transformers` module and its task in a list of names, so Granulon
is added to both. A chat request may also name a level and a view in the fields `granularity` and `visual_view`.
Unusable requests get status 400 (serve_requests.py). An image is a data URL or, with `--allow-urls`, a public http(s)
address, never a file of the server.
"""

import asyncio
import inspect
import sys
from contextvars import ContextVar
from typing import Annotated

import torch
import transformers
import typer
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from PIL import Image
from transformers.cli.serve import Serve
from transformers.cli.serving import chat_completion, model_manager, response, server, utils
from transformers.generation import StoppingCriteria
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from modeling_granulon import GranulonForConditionalGeneration
from modeling_granulon.image_tokens import VISUAL_VIEWS

from .inference import open_image, read_config
from .serve_requests import MAX_BODY, Gate, Refused

MAX_IMAGES = 8  # of a request
KEPT_PIXELS = 2_000_000  # of an image while its request waits
ROLES = ("system", "developer", "user", "assistant", "tool")
TEXTS, IMAGES = ("text", "input_text", "output_text"), ("image_url", "input_image")  # types of a message's parts
GENERATE_OPTIONS = ContextVar("generate_options")  # level and view of the request that this task answers
STOPPED = ContextVar("stopped", default=None)  # its StopText, if it has one
upstream_inputs = utils.BaseHandler.get_processor_inputs_from_messages
upstream_build_server = server.build_server


class Limits:
    """What the server was started with."""

    allow_urls = False
    max_images = MAX_IMAGES


decoding = asyncio.Lock()  # one image is decoded at a time, so that memory holds one in full size


class GranulonRequest(chat_completion.TransformersCompletionCreateParamsStreaming, total=False):
    """A chat request with two more fields: a level (name or index) and a view."""

    granularity: str | int
    visual_view: str


class GranulonChatHandler(chat_completion.ChatCompletionHandler):
    """The chat endpoint, which passes level and view to `generate` and leaves out what stops an answer."""

    _valid_params_class = GranulonRequest

    async def handle_request(self, body, request_id):
        """As upstream; an unusable image and an unknown level or view are refused."""
        options = {name: body.pop(name) for name in ("granularity", "visual_view") if name in body}
        _, model, processor = self._resolve_model(body)
        _check_options(options, model.config)
        if stop := body.pop("stop", None):
            stops = [stop] if isinstance(stop, str) else stop
            STOPPED.set(StopText(stops))
            options["stopping_criteria"] = [StopAtText(processor.tokenizer, stops)]
        GENERATE_OPTIONS.set(options)
        body["messages"] = await _open_images(body.get("messages"))
        return await super().handle_request(body, request_id)

    def _streaming(self, request_id, model, processor, model_id, inputs, *args, **kwargs):
        inputs = {**inputs, **GENERATE_OPTIONS.get()}
        return super()._streaming(request_id, model, processor, model_id, inputs, *args, **kwargs)

    def _non_streaming(self, request_id, model, processor, model_id, inputs, *args, **kwargs):
        inputs = {**inputs, **GENERATE_OPTIONS.get()}
        return super()._non_streaming(request_id, model, processor, model_id, inputs, *args, **kwargs)

    def _build_completion(self, request_id, content, *args, **kwargs):
        if stop := STOPPED.get():
            content = stop.push(content) + stop.rest()
        return super()._build_completion(request_id, content, *args, **kwargs)

    def _build_chunk_sse(self, request_id="", content=None, finish_reason=None, **kwargs):
        build, stop = super()._build_chunk_sse, STOPPED.get()
        if stop is None:
            return build(request_id, content=content, finish_reason=finish_reason, **kwargs)
        content = stop.rest() if finish_reason else stop.push(content or "")
        before = build(request_id, content=content, model=kwargs.get("model")) if finish_reason and content else ""
        content = None if finish_reason else content
        return before + build(request_id, content=content, finish_reason=finish_reason, **kwargs)


class GranulonResponseHandler(response.ResponseHandler):
    """The endpoint of OpenAI's newer interface, without levels and views."""

    async def handle_request(self, body, request_id):
        """As upstream; what it cannot read is refused."""
        try:
            messages = self._normalize_input(body)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise HTTPException(400, f"input: invalid, {type(error).__name__}: {error}") from error
        body = {name: value for name, value in body.items() if name != "instructions"}
        return await super().handle_request(body | {"input": await _open_images(messages)}, request_id)


class StopAtText(StoppingCriteria):
    """Ends an answer once it holds one of some texts. `stop_strings` would also read the end of the prompt."""

    def __init__(self, tokenizer, stops: list[str]):
        self.tokenizer, self.stops, self.start = tokenizer, stops, None

    def __call__(self, input_ids, scores, **kwargs):
        if self.start is None:
            self.start = input_ids.shape[1] - 1  # first asked after the first token
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        found = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(found, device=input_ids.device)


class StopText:
    """An answer up to the first of some texts; what might begin one of them is held back until it is clear."""

    def __init__(self, stops: list[str]):
        self.stops, self.held, self.found = stops, "", False

    def push(self, text: str) -> str:
        """What can be shown of the answer now."""
        if self.found:
            return ""
        self.held += text
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if places:
            self.found, shown, self.held = True, self.held[: min(places)], ""
            return shown
        longest = max(
            length
            for stop in self.stops
            for length in range(len(stop))
            if length == 0 or self.held.endswith(stop[:length])
        )
        shown, self.held = self.held[: len(self.held) - longest], self.held[len(self.held) - longest :]
        return shown

    def rest(self) -> str:
        """What was held back, at the end of the answer."""
        held, self.held = self.held, ""
        return held


def processor_inputs(messages, modality):
    """As upstream, for messages whose images the handlers have opened."""
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
        kinds = ("data:", "http://", "https://") if Limits.allow_urls else ("data:",)
        if not str(source).startswith(kinds):
            expected = (
                " or an http(s) address" if Limits.allow_urls else "; addresses need granulon-serve --allow-urls"
            )
            raise ValueError(f"an image is a data URL (data:image/png;base64,...){expected}")
        image = open_image(str(source), public_only=True)
    except ValueError as error:
        raise HTTPException(400, f"image_url: {error}") from error
    scale = (KEPT_PIXELS / (image.width * image.height)) ** 0.5
    return image if scale >= 1 else image.resize([max(round(side * scale), 1) for side in image.size])


async def _open_images(messages):
    """`_with_images` in a thread, since downloading and decoding would block all other requests."""
    async with decoding:
        return await asyncio.to_thread(_with_images, messages)


def _with_images(messages):
    """A copy of the messages with their images opened."""
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        needed = f"a list of at least one object with content and a role of {', '.join(ROLES)} is needed"
        raise HTTPException(400, f"messages: {needed}")
    parts = [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]
    images = sum(isinstance(part, dict) and part.get("type") in IMAGES for part in parts)
    if images > Limits.max_images:
        raise HTTPException(400, f"messages: {images} images; a request may have {Limits.max_images} (--max-images)")
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
    """The model that the server was started with, which is the only one it serves."""
    return [{"id": manager.force_model, "object": "model", "created": 0, "owned_by": ""}]


async def refuse(request, error: HTTPException):
    """A refusal of an endpoint in the form of OpenAI's errors."""
    return JSONResponse(Refused(error.status_code, error.detail).body(), error.status_code)


def register(max_body: int = MAX_BODY):
    """Add Granulon to `transformers serve` in this process, and a `Gate` before it."""
    name = GranulonForConditionalGeneration.__name__
    setattr(transformers, name, GranulonForConditionalGeneration)
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["granulon"] = name
    chat_completion.ChatCompletionHandler = GranulonChatHandler
    response.ResponseHandler = GranulonResponseHandler
    utils.BaseHandler.get_processor_inputs_from_messages = staticmethod(processor_inputs)
    model_manager.ModelManager.get_gen_models = listed_models

    def build_server(*args, **kwargs):
        app = upstream_build_server(*args, **kwargs)
        app.add_exception_handler(HTTPException, refuse)
        app.add_middleware(Gate, max_body=max_body)
        return app

    server.build_server = build_server


OPTIONS = {  # beside those of `transformers serve`
    "allow_urls": (bool, typer.Option(help="Fetch images from public http(s) addresses."), False),
    "max_images": (int, typer.Option(help="Images of a request.", min=1), MAX_IMAGES),
    "max_body_mb": (int, typer.Option(help="Megabytes of a request.", min=1), MAX_BODY // 10**6),
}


def serve(force_model: str, allow_urls: bool, max_images: int, max_body_mb: int, **options):
    """Check the model, then serve it; one line to stderr for a model that cannot be served."""
    try:
        if not force_model:
            raise ValueError("name a model: granulon-serve FOLDER or granulon-serve OWNER/NAME")
        name, _, revision = force_model.partition("@")
        read_config(name, revision or "main")
    except ValueError as error:
        sys.exit(f"granulon-serve: {error}")
    Limits.allow_urls, Limits.max_images = allow_urls, max_images
    register(max_body_mb * 10**6)
    Serve(force_model, **options)


def make_command():
    """The command with the options of `transformers serve` and our own."""
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        for name, (kind, option, default) in OPTIONS.items()
    ]
    upstream = inspect.signature(Serve)
    serve.__signature__ = upstream.replace(parameters=[*upstream.parameters.values(), *parameters])
    serve.__annotations__ = {name: entry.annotation for name, entry in serve.__signature__.parameters.items()}
    command = typer.Typer(add_completion=False)
    command.command(help=__doc__)(serve)
    return command


def main():
    make_command()()


if __name__ == "__main__":
    main()
