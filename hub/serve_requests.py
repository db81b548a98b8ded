"""What a request to `granulon-serve` may hold: other fields, types and sizes are refused before the model runs.

`Gate` stands before the server. It lets known endpoints through, reads a body up to a limit of bytes and seconds, and
checks its fields; a refusal has the form of OpenAI's errors and names the field.
"""

import asyncio
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MAX_BODY = 32_000_000  # bytes
BODY_SECONDS = 60
MAX_TOKENS = 8192  # of an answer
Temperature, TopP = Annotated[float, Field(ge=0, le=2)], Annotated[float, Field(ge=0, le=1)]
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Stop = Annotated[str, Field(min_length=1, max_length=100)]
Nothing = Annotated[list, Field(max_length=0)] | None
Zero = Literal[0] | None


class Request(BaseModel):
    """Fields of both endpoints. What changes nothing is accepted; what would, and is not supported, is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Zero = None
    store: Literal[False] | None = None
    # For the books of whoever asks.
    metadata: dict[str, Any] | None = None
    user: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatRequest(Request):
    """Of /v1/chat/completions."""

    messages: Any  # checked where their images are opened
    granularity: str | int | None = None
    visual_view: str | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool] | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None

    @model_validator(mode="after")
    def _check_biased_tokens(self):
        if any(not token.isdecimal() for token in self.logit_bias or {}):
            raise ValueError("logit_bias: the keys are numbers of tokens")
        return self


class ResponsesRequest(Request):
    """Of /v1/responses."""

    input: Any
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    truncation: Literal["disabled"] | None = None
    include: Nothing = None
    background: Literal[False] | None = None
    text: dict[Literal["format"], dict[Literal["type"], Literal["text"]]] | None = None


BODIES = {"/v1/chat/completions": ChatRequest, "/v1/responses": ResponsesRequest}
READ_ONLY = ("/v1/models", "/health")


class Refused(Exception):
    """A request that goes no further: status, message and the field it is about."""

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    def body(self) -> dict:
        """In the form of OpenAI's errors."""
        kind = "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


def check_body(path: str, data: bytes) -> dict:
    """The fields of a request that are not null; raises `Refused`."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refused(400, f"the body is a JSON {type(body).__name__}; expected an object")
    try:
        BODIES[path].model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else None
        reason = "not supported" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise Refused(400, reason if name is None else f"{name}: {reason}", name) from error
    return {name: value for name, value in body.items() if value is not None}


class Gate:
    """ASGI middleware that lets through what `check_body` accepts, on the endpoints of `BODIES` and `READ_ONLY`."""

    def __init__(self, app, max_body: int = MAX_BODY, seconds: float = BODY_SECONDS):
        self.app, self.max_body, self.seconds = app, max_body, seconds

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            await self.app(scope, receive, send)
            return
        try:
            receive = await self._checked(scope, receive)
        except Refused as refusal:
            data = json.dumps(refusal.body()).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
            headers.append((b"connection", b"close"))  # what is left of the body is not read
            await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
            await send({"type": "http.response.body", "body": data})
        else:
            await self.app(scope, receive, send)

    async def _checked(self, scope, receive):
        """A `receive` that gives the checked body; raises `Refused`."""
        path = scope["path"]
        if scope["method"] == "GET" and path in READ_ONLY:
            return receive
        if scope["method"] != "POST" or path not in BODIES:
            known = ", ".join((*BODIES, *READ_ONLY))
            raise Refused(404, f"{scope['method']} {path} is not served; the endpoints are {known}")
        try:
            data = await asyncio.wait_for(self._read(dict(scope["headers"]), receive), self.seconds)
        except TimeoutError as error:
            raise Refused(408, f"the body took longer than {self.seconds} seconds") from error
        body = json.dumps(check_body(path, data)).encode()
        message = {"type": "http.request", "body": body, "more_body": False}
        scope["headers"] = [
            (name, str(len(body)).encode() if name == b"content-length" else value)
            for name, value in scope["headers"]
            if name != b"transfer-encoding"
        ]
        waiting = [message]

        async def checked():
            return waiting.pop() if waiting else await receive()

        return checked

    async def _read(self, headers: dict, receive) -> bytes:
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.max_body:
            raise Refused(413, self._too_large())
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the client went away")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body:
                raise Refused(413, self._too_large())
            if not message.get("more_body"):
                return b"".join(parts)

    def _too_large(self) -> str:
        return f"the body is larger than {self.max_body} bytes; send fewer or smaller images"
