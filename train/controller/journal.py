"""Paid calls of a language model: each made once and logged, under a cost cap, with retries.

A call is written to the journal before it is sent, with the most it can cost, and again when it ends, with its actual
cost. After a crash at any point a later run therefore knows which replies it has and what it may have paid for:
logged replies are not requested again, and a call without a logged end counts in full, so that the cap holds over all
runs together.

The openai client's own retries are turned off: they would be sent without being logged.
"""

import asyncio
import hashlib
import json
import os
import random
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import openai
from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from granulon.hub.files import JsonlLog

SENT, ANSWERED, FAILED, REJECTED = "sent", "answered", "failed", "rejected"
TEMPORARY_STATUS = (408, 409, 425, 429)  # and all from 500 on: worth a retry
CONTENT_STATUS = (400, 413, 422)  # this content may be at fault, unless no call was ever answered
GATEWAY_TIMEOUT_STATUS = (408, 504, 524)  # the model may have worked, and the call may be charged
QUOTA_EXHAUSTED = "insufficient_quota"  # error code that comes with status 429, and that no waiting helps
CONNECTION_FAILED = ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol")  # of httpx: nothing sent
FIRST_WAIT = 1.0  # seconds before the second attempt, doubled for each further one
LONGEST_WAIT = 60.0  # seconds, of the exponential backoff
LONGEST_RETRY_AFTER = 600.0  # seconds; an endpoint that asks for more ends the run
TIMEOUT = 300.0  # seconds to wait for a reply; a model that reasons takes long
SHORTEST_KEY = 8  # characters; a shorter API key of a local endpoint may be any word
TEMPLATE_TOKENS = 64  # the most that a chat template adds to the text of a call
CHARACTERS_PER_TOKEN = 4  # of English, for the estimate; the cap counts a token for each byte


class StopRun(Exception):
    """No further call makes sense; the message says why and what to do. All replies so far are in the journal."""


class BudgetExceeded(StopRun):
    """The next call might cost more than is left."""


class SchemaMismatch(Exception):
    """A reply that was paid for and does not fit the schema."""


@dataclass(frozen=True)
class Prices:
    """In USD per million tokens."""

    input: float
    output: float

    def of(self, input_tokens: int, output_tokens: int) -> float:
        """The cost in USD."""
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


@dataclass
class Request:
    """A call to make: `messages` as the endpoint takes them; `key` identifies it, see `call_key`."""

    key: str
    messages: list[dict]


def call_key(content, model: str, prompt_sha: str, variant: str = "") -> str:
    """The identity of a call: content (JSON), model, hash of the prompt, and a name for repeated calls."""
    identity = json.dumps([content, model, prompt_sha, variant], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(identity.encode()).hexdigest()


@dataclass(kw_only=True)
class ApiArguments:
    """Options of every command that calls a paid model at an OpenAI-compatible endpoint; commands inherit them."""

    model: str | None = field(default=None, metadata={"help": "name of the model at the endpoint"})
    base_url: str | None = field(default=None, metadata={"help": "address of the endpoint; OpenAI's by default"})
    prices: list[float] = field(
        default_factory=list,
        metadata={"help": "USD per million input tokens and per million output tokens; 0 0 for a free endpoint"},
    )
    max_cost: float = field(default=10.0, metadata={"help": "USD to spend at most, earlier runs included"})
    max_tokens: int = field(default=800, metadata={"help": "maximum tokens of a reply, reasoning included"})
    concurrency: int = field(default=16, metadata={"help": "calls in flight at a time"})
    retry_quarantined: bool = field(default=False, metadata={"help": "ask again what got no usable reply before"})
    dry_run: bool = field(default=False, metadata={"help": "count calls and estimate their cost; send nothing"})

    def __post_init__(self):
        if not self.model:
            raise ValueError("no model is given; name the one to call with --model")
        if len(self.prices) != 2:
            raise ValueError(
                f"--prices has {len(self.prices)} numbers, expected two: USD per million input tokens and per million "
                "output tokens (0 0 for a free endpoint); the cap of --max_cost depends on them"
            )
        if not all(0 <= price < float("inf") for price in self.prices) or not self.max_cost >= 0:  # nor NaN
            raise ValueError(f"--prices are {self.prices} and --max_cost {self.max_cost}; expected 0 or more")
        if min(self.concurrency, self.max_tokens) < 1:
            raise ValueError(
                f"--concurrency is {self.concurrency} and --max_tokens {self.max_tokens}; expected 1 or more"
            )

    def estimate(self, calls: int, characters: int, reply_tokens: int, spent: float, image_tokens: int = 0) -> str:
        """
        A sentence on what calls will cost.

        Args:
            calls: how many are to be made.
            characters: of all their texts together.
            reply_tokens: expected for one reply.
            spent: USD in the journal.
            image_tokens: of all their images together.
        """
        read, written = characters // CHARACTERS_PER_TOKEN + image_tokens, reply_tokens * calls
        return (
            f"estimated cost {Prices(*self.prices).of(read, written):.4f} USD ({read} tokens in, {written} out); "
            f"{spent:.4f} USD are spent, the cap is {self.max_cost:g}"
        )


class Journal(JsonlLog):
    """
    The log of all calls, open in one process at a time.

    Attributes:
        answers: by key, the entry with `answer`, `usage`, `cost` and `at`.
        rejected: by key, the reason why a content gets no usable reply.

    Args:
        path: the file (JSON Lines); made if it does not exist.
        max_cost: the cap in USD over everything in the file; None for no cap.

    Raises:
        ValueError: the file is open in another process or has an unknown entry; a cap below 0.
    """

    def __init__(self, path: str | Path, max_cost: float | None = None):
        if max_cost is not None and not max_cost >= 0:
            raise ValueError(f"the cap is {max_cost} USD; expected 0 or more")
        self.max_cost = max_cost
        self.answers, self.rejected = {}, {}
        self.open_calls, self.settled = {}, 0.0  # most that each open call may cost; cost of all that ended
        self.calls = 0
        super().__init__(path)
        try:
            self._load()
        except ValueError:
            self.close()
            raise

    @property
    def spent(self) -> float:
        """USD; calls without a logged end count in full."""
        return self.settled + sum(self.open_calls.values())

    def reserve(self, key: str, most: float) -> int:
        """Log that a call is about to be sent and costs at most so many USD; its number. Raises `BudgetExceeded`."""
        if self.max_cost is not None and self.spent + most > self.max_cost:
            raise BudgetExceeded(
                f"{self.spent:.4f} USD of {self.max_cost:g} are spent, and the next call may cost {most:.4f}: run the "
                "same command with a higher --max_cost to go on"
            )
        self._write({"event": SENT, "call": self.calls + 1, "key": key, "cost": most})
        return self.calls

    def settle(self, call: int, key: str, cost: float, answer: dict | None = None, **more):
        """Log how a call ended: with an answer, or without."""
        event = FAILED if answer is None else ANSWERED
        self._write({"event": event, "call": call, "key": key, "cost": cost, "answer": answer, **more})

    def reject(self, key: str, reason: str):
        """Log that a content gets no usable reply, so that it is not sent again."""
        self._write({"event": REJECTED, "key": key, "reason": reason})

    def _write(self, entry: dict):
        try:
            self.append(entry)
        except OSError as error:
            raise StopRun(f"{self.path} cannot be written ({error}); make room and run the same command") from error
        self._apply(entry)

    def _load(self):
        for number, entry in enumerate(self.read(), 1):
            try:
                self._apply(entry)
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}:{number} is not a journal entry ({str(entry)[:60]}); restore the file, or move "
                    "it away and pay again"
                ) from error

    def _apply(self, entry: dict):
        if entry["event"] == REJECTED:
            self.rejected[entry["key"]] = entry["reason"]
            return
        if entry["event"] == SENT:
            self.calls = entry["call"]
            self.open_calls[entry["call"]] = entry["cost"]
            return
        self.open_calls.pop(entry["call"])
        self.settled += entry["cost"]
        if entry["event"] == ANSWERED:
            self.answers[entry["key"]] = entry
            self.rejected.pop(entry["key"], None)


@dataclass
class Endpoint:
    """
    An OpenAI-compatible endpoint with structured outputs, called through a journal.

    Args:
        client: with `max_retries=0`.
        model: its name at the endpoint.
        journal: where calls are logged.
        schema: pydantic model of the reply; with `extra="forbid"` and without defaults, as strict schemas must be.
        prices: of the model.
        max_tokens: of a reply.
        attempts: how often a content is sent before it is left for another run.
        schema_attempts: how many replies may miss the schema before the content is rejected.

    Raises:
        ValueError: the client retries by itself.
    """

    client: openai.AsyncOpenAI
    model: str
    journal: Journal
    schema: type[BaseModel]
    prices: Prices
    max_tokens: int = 512
    attempts: int = 6
    schema_attempts: int = 3

    def __post_init__(self):
        if self.client.max_retries:
            raise ValueError(f"the client retries {self.client.max_retries} times by itself; pass max_retries=0")
        schema = {"name": "reply", "strict": True, "schema": self.schema.model_json_schema()}
        self.response_format = {"type": "json_schema", "json_schema": schema}
        self.call_ended = asyncio.Condition()
        self.calls_in_flight, self.failures_in_a_row = 0, 0
        self.stop: StopRun | None = None

    def most_cost(self, messages: list[dict]) -> float:
        """The most a call can cost in USD: a token for each byte, since no tokenizer makes more."""
        text = json.dumps([messages, self.response_format], ensure_ascii=False)
        return self.prices.of(len(text.encode()) + TEMPLATE_TOKENS, self.max_tokens)

    async def ask_all(
        self, requests: Iterable[Request], concurrency: int = 16, on_done: Callable[[], None] = lambda: None
    ) -> StopRun | None:
        """
        Send the requests that the journal has no reply for; the answers are in the journal.

        Args:
            requests: at most `concurrency` of them are in flight at once; a key that comes twice is sent once.
            on_done: called after each request, whatever its outcome.

        Returns:
            why it stopped before the end, if it did.
        """
        pending, started, most_failures = iter(requests), set(), max(10, 2 * concurrency)

        async def worker():
            for request in pending:
                if self.stop:
                    return
                if request.key not in started and request.key not in self.journal.rejected:
                    started.add(request.key)
                    try:
                        await self.ask(request)
                        self._count_failures(request.key, most_failures)
                    except StopRun as stop:
                        self.stop = self.stop or stop
                        return
                on_done()

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
        return self.stop

    def _count_failures(self, key: str, most: int):
        """Raises `StopRun` after so many contents in a row without a usable reply."""
        self.failures_in_a_row = 0 if key in self.journal.answers else self.failures_in_a_row + 1
        if self.failures_in_a_row < most:
            return
        if key not in self.journal.rejected:
            raise StopRun(
                f"{self.client.base_url} gave no reply for the last {self.failures_in_a_row} contents: run the same "
                "command again when it is back"
            )
        raise StopRun(
            f"{self.failures_in_a_row} contents in a row got no usable reply from {self.model}, so that no more are "
            f"paid for: {self.journal.rejected[key]}; fix the cause and add --retry_quarantined"
        )

    async def ask(self, request: Request) -> dict | None:
        """
        The journal's entry with the reply; None if the content was rejected or all attempts failed.

        Raises:
            StopRun: no other content would get a reply either.
        """
        key, mismatches = request.key, 0
        for attempt in range(self.attempts):
            if key in self.journal.answers or key in self.journal.rejected or self.stop:
                break
            error = await self._call(request)
            if isinstance(error, SchemaMismatch):
                mismatches += 1
                if mismatches == self.schema_attempts:
                    self.journal.reject(key, f"{mismatches} replies did not fit the schema, the last: {error}")
                    break
            elif isinstance(error, openai.APIStatusError):
                self._reject_unless_temporary(error, key)
            if error is not None:
                await self._wait(error, attempt)
        return self.journal.answers.get(key)

    async def _call(self, request: Request) -> Exception | None:
        """One call, logged before and after; its error, if it failed."""
        call = await self._reserve(request)
        try:
            return await self._send(request, call)
        finally:
            async with self.call_ended:
                self.calls_in_flight -= 1
                self.call_ended.notify_all()

    async def _send(self, request: Request, call: int) -> Exception | None:
        cost = most = self.journal.open_calls[call]
        answer = error = None
        try:
            reply = await self.client.chat.completions.create(
                model=self.model,
                messages=request.messages,
                response_format=self.response_format,
                max_completion_tokens=self.max_tokens,
            )
            usage, cost = self._usage(reply, most)
            answer = self.schema.model_validate_json(reply.choices[0].message.content or "").model_dump()
            logged = {"usage": usage, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        except ValidationError as mismatch:
            error = SchemaMismatch(self._mismatch_reason(reply.choices[0]) or str(mismatch).replace("\n", " "))
        except openai.APIStatusError as refusal:  # is not charged
            error, cost = refusal, most if refusal.status_code in GATEWAY_TIMEOUT_STATUS else 0.0
        except (openai.APIError, ValueError, AttributeError, LookupError, TypeError, RecursionError) as failure:
            # The connection broke, a timeout, or a malformed reply: charged, unless nothing was sent.
            error, cost = failure, 0.0 if type(failure.__cause__).__name__ in CONNECTION_FAILED else most
        if error is not None:
            logged = {"reason": self._without_key(f"{type(error).__name__}: {error}")}
        self.journal.settle(call, request.key, cost, answer, **logged)
        if self.journal.max_cost is not None and cost > most:
            raise StopRun(
                f"a call to {self.client.base_url} cost {cost:.4f} USD, and at most {most:.4f} was expected: the "
                f"endpoint ignores the limit of {self.max_tokens} tokens a reply, so that no cap would hold; raise "
                "--max_tokens to what it writes"
            )
        return error

    async def _reserve(self, request: Request) -> int:
        """Reserve the most a call can cost; while calls in flight hold too much of the budget, wait for their end."""
        most = self.most_cost(request.messages)
        async with self.call_ended:
            while True:
                if self.stop:
                    raise self.stop
                try:
                    call = self.journal.reserve(request.key, most)
                except BudgetExceeded:
                    if not self.calls_in_flight:
                        raise
                    await self.call_ended.wait()
                else:
                    self.calls_in_flight += 1
                    return call

    def _usage(self, reply, most: float) -> tuple[dict | None, float]:
        """Tokens and USD of a reply; without a valid token count, the most it can have cost."""
        counts = [getattr(reply.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            return None, most
        return dict(zip(("input_tokens", "output_tokens"), counts, strict=True)), self.prices.of(*counts)

    def _mismatch_reason(self, choice) -> str | None:
        """What the endpoint itself says of a reply that does not fit."""
        if choice.finish_reason == "length":
            return f"the reply was cut off after {self.max_tokens} tokens; raise --max_tokens"
        if choice.finish_reason == "content_filter":
            return "the endpoint's filter cut the reply off"
        refusal = getattr(choice.message, "refusal", None)
        return f"the model refuses: {self._without_key(refusal)}" if refusal else None

    def _without_key(self, error) -> str:
        """An endpoint's message without the API key, which some of them repeat."""
        key = self.client.api_key
        return str(error).replace(key, "<key>") if len(key) >= SHORTEST_KEY else str(error)

    def _reject_unless_temporary(self, error: openai.APIStatusError, key: str):
        """Return where a retry may help; else reject the content, or raise `StopRun` if all calls would fail."""
        status = error.status_code
        if (status in TEMPORARY_STATUS or status >= 500) and error.code != QUOTA_EXHAUSTED:
            return
        if status in CONTENT_STATUS and self.journal.answers:
            self.journal.reject(key, self._without_key(error))
            return
        raise StopRun(
            f"{self.client.base_url} refused the call: {self._without_key(error)}; check the key (OPENAI_API_KEY), "
            f"the name of the model ({self.model}), the account, and whether the endpoint supports structured outputs"
        ) from error

    async def _wait(self, error: Exception, attempt: int):
        """Exponential backoff with jitter, at least the seconds of a Retry-After header."""
        wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
        if isinstance(error, openai.APIStatusError):
            try:
                wait = max(wait, float(error.response.headers.get("retry-after", 0)))
            except ValueError:  # a date instead of seconds
                pass
        if wait > LONGEST_RETRY_AFTER:
            raise StopRun(f"{self.client.base_url} asks to wait for {wait:.0f} seconds: run the same command then")
        await asyncio.sleep(wait)


def ask_with_bar(
    requests: Iterable[Request],
    total: int,
    make_endpoint: Callable[[openai.AsyncOpenAI], Endpoint],
    *,
    base_url: str | None,
    concurrency: int,
    timeout: float = TIMEOUT,
) -> StopRun | None:
    """
    `Endpoint.ask_all` for a command: with a client, a progress bar that shows the cost, and SIGTERM handled as Ctrl-C.

    Args:
        requests, total: the calls and how many they are.
        make_endpoint: builds the endpoint from the client, whose key is OPENAI_API_KEY; local endpoints need none.

    Returns:
        why it stopped before the end, if it did.
    """

    async def ask() -> StopRun | None:
        key = os.environ.get("OPENAI_API_KEY", "none")
        async with openai.AsyncOpenAI(api_key=key, base_url=base_url, timeout=timeout, max_retries=0) as client:
            endpoint = make_endpoint(client)
            with tqdm(total=total, unit="call", disable=None) as bar:

                def on_done():
                    bar.update()
                    bar.set_postfix(usd=f"{endpoint.journal.spent:.4f}", refresh=False)

                return await endpoint.ask_all(requests, concurrency, on_done)

    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return asyncio.run(ask())
    finally:
        signal.signal(signal.SIGTERM, previous)
