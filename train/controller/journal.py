"""Paid calls of a language model: each made once and logged, under a cost cap, with retries.

A call is logged before it is sent, with the most it can cost, and when it ends, with its cost and its answers. After a
crash at any point a later run knows what is answered, and a call without a logged end counts in full: no answered
request is sent again, and the cap holds over all runs together.
"""

import asyncio
import hashlib
import json
import math
import os
import random
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import openai
from pydantic import BaseModel
from tqdm import tqdm

from granulon.hub.files import JsonlLog

TEMPORARY_STATUS = (408, 409, 425, 429)  # and all from 500 on: worth a retry
CONTENT_STATUS = (400, 413, 422)  # this content may be at fault, unless no call was ever answered
GATEWAY_TIMEOUT_STATUS = (408, 504, 524)  # the model may have worked, and the call may be charged
QUOTA_EXHAUSTED = "insufficient_quota"  # error code that comes with status 429, and that no waiting helps
CONNECTION_FAILED = ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol")  # of httpx: nothing sent
MALFORMED = (ValueError, AttributeError, LookupError, TypeError, RecursionError)  # what reading a reply may raise
ATTEMPTS, SCHEMA_ATTEMPTS = 6, 3  # of a call in one run; replies to a request alone that may miss the schema
FIRST_WAIT, LONGEST_WAIT, LONGEST_RETRY_AFTER = 1.0, 60.0, 600.0  # seconds between attempts; the first doubles
TIMEOUT = 300.0  # seconds to wait for a reply; a model that reasons takes long
SHORTEST_KEY = 8  # characters; a shorter API key of a local endpoint may be any word
TEMPLATE_TOKENS = 64  # the most that a chat template adds to the text of a call
CHARACTERS_PER_TOKEN = 4  # of English, for the estimate; the cap counts a token for each byte


class StopRun(Exception):
    """No further call makes sense; the message says why and what to do. All replies so far are in the journal."""


class BudgetExceeded(StopRun):
    """The next call might cost more than is left."""


class SchemaMismatch(Exception):
    """A reply that was paid for and lacks a valid answer to a request of its call."""


def call_key(content, model: str, prompt_sha: str, variant: str = "") -> str:
    """The identity of a request: content (JSON), model, hash of the prompt, and a name for repeated ones."""
    return hashlib.sha256(json.dumps([content, model, prompt_sha, variant], sort_keys=True).encode()).hexdigest()


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
                f"--prices has {len(self.prices)} numbers, expected two: USD per million tokens in and out (0 0 for a "
                "free endpoint); the cap of --max_cost depends on them"
            )
        if not all(0 <= price < math.inf for price in self.prices) or not self.max_cost >= 0:  # nor NaN
            raise ValueError(f"--prices are {self.prices} and --max_cost {self.max_cost}; expected 0 or more")
        found = f"--concurrency is {self.concurrency} and --max_tokens {self.max_tokens}"
        if min(self.concurrency, self.max_tokens) < 1:
            raise ValueError(f"{found}; expected 1 or more")

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        """In USD."""
        return (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / 1e6

    def estimate(self, tokens_in: int, tokens_out: int, spent: float) -> str:
        """A sentence on the cost of calls to come, and on the USD spent before."""
        return (
            f"estimated cost {self.cost(tokens_in, tokens_out):.4f} USD ({tokens_in} tokens in, {tokens_out} out); "
            f"{spent:.4f} USD are spent, the cap is {self.max_cost:g}"
        )


class Journal(JsonlLog):
    """
    The log of all calls in a file, which one process at a time can open; `max_cost` caps the USD over all of them.

    Attributes:
        answers: by key, `answer`, `at`, and `usage` (its share of the tokens of the call).
        rejected: by key, the reason why no usable reply is to be had.

    Raises:
        ValueError: the file is open in another process or has an unknown entry.
    """

    def __init__(self, path: str | Path, max_cost: float = math.inf):
        self.max_cost, self.answers, self.rejected = max_cost, {}, {}
        self.calls, self.settled, self.open_calls = 0, 0.0, {}  # last number; USD of those ended; most of the others
        super().__init__(path)
        try:
            for number, entry in enumerate(self.read(), 1):
                self._apply(entry, number)
        except ValueError:
            self.close()
            raise

    @property
    def spent(self) -> float:
        """USD; calls without a logged end count in full."""
        return self.settled + sum(self.open_calls.values())

    def reserve(self, most: float) -> int:
        """Log that a call is about to be sent and costs at most so many USD; its number. Raises `BudgetExceeded`."""
        if not self.spent + most <= self.max_cost:  # nor NaN
            raise BudgetExceeded(
                f"{self.spent:.4f} USD of {self.max_cost:g} are spent, and the next call may cost {most:.4f}: run the "
                "same command with a higher --max_cost to go on"
            )
        self._write({"event": "sent", "call": self.calls + 1, "cost": most})
        return self.calls

    def settle(self, call: int, cost: float, answers: dict[str, dict], **more):
        """Log how a call ended: its cost, the answers by key, and more."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        self._write({"event": "ended", "call": call, "cost": cost, "answers": answers, "at": at, **more})

    def reject(self, key: str, reason: str):
        """Log that a request gets no usable reply, so that it is not sent again."""
        self._write({"event": "rejected", "key": key, "reason": reason})

    def _write(self, entry: dict):
        try:
            self.append(entry)
        except OSError as error:
            raise StopRun(f"{self.path} cannot be written ({error}); make room and run the same command") from error
        self._apply(entry)

    def _apply(self, entry: dict, line: int | None = None):
        match entry:
            case {"event": "sent", "call": int(call), "cost": float() | int() as most}:
                self.calls, self.open_calls[call] = call, most
            case {"event": "ended", "call": call, "cost": float() | int() as cost, "answers": dict(answers)} if (
                self.open_calls.pop(call, None) is not None
            ):
                self.settled += cost
                for key, answer in answers.items():
                    self.answers[key] = {"answer": answer, "usage": entry.get("usage"), "at": entry.get("at")}
                    self.rejected.pop(key, None)
            case {"event": "rejected", "key": str(key), "reason": str(reason)}:
                self.rejected[key] = reason
            case _:
                raise ValueError(
                    f"{self.path}:{line} is not a journal entry ({str(entry)[:60]}); restore or move away the file"
                )


class Endpoint:
    """
    An OpenAI-compatible endpoint with structured outputs, called through a journal; its key is OPENAI_API_KEY.

    A call is a mapping of keys (see `call_key`) to what is asked. For several in one call, subclasses override
    `messages` and `read`.

    Args:
        options: model, address, prices and limits.
        schema: pydantic model of a reply; with `extra="forbid"` and without defaults, as strict schemas must be.
    """

    def __init__(self, options: ApiArguments, journal: Journal, schema: type[BaseModel]):
        self.options, self.journal, self.schema = options, journal, schema
        self.api_key = os.environ.get("OPENAI_API_KEY", "none")  # local endpoints need none
        reply = {"name": "reply", "strict": True, "schema": schema.model_json_schema()}
        self.response_format = {"type": "json_schema", "json_schema": reply}
        limits = {"response_format": self.response_format, "max_completion_tokens": options.max_tokens}
        self.same_in_all_calls = {"model": options.model, **limits}
        self.in_flight, self.failures_in_a_row, self.stop = set(), 0, None

    def messages(self, call: dict) -> list[dict]:
        """The messages of a call; by default its only entry."""
        return next(iter(call.values()))

    def read(self, call: dict, text: str) -> dict[str, dict | str]:
        """By key the answer in a reply, or what is wrong with it; an error is wrong with all of them."""
        return dict.fromkeys(call, self.schema.model_validate_json(text).model_dump())

    def most_cost(self, messages: list[dict]) -> float:
        """The most a call can cost in USD: a token for each byte, since no tokenizer makes more."""
        text = json.dumps([messages, self.response_format], ensure_ascii=False)
        return self.options.cost(len(text.encode()) + TEMPLATE_TOKENS, self.options.max_tokens)

    def ask_all(self, calls: Iterable[dict], total: int) -> StopRun | None:
        """
        Ask all that the journal has no answer for, in `total` calls with a progress bar; answers are in the journal.

        What gets no valid answer in a call of several is asked again alone. SIGTERM interrupts as Ctrl-C does. Returns
        why it stopped before the end, if it did.
        """
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return asyncio.run(self._ask_all(calls, total))
        finally:
            signal.signal(signal.SIGTERM, previous)

    async def _ask_all(self, calls: Iterable[dict], total: int) -> StopRun | None:
        calls, seen = iter(calls), {*self.journal.answers, *self.journal.rejected}

        async def worker():
            for call in calls:
                new = {key: content for key, content in call.items() if key not in seen}
                seen.update(new)
                try:
                    for single in await self._ask(new) if new else []:
                        await self._ask(single)
                except StopRun as stop:
                    self.stop = self.stop or stop
                    return
                bar.update()
                bar.set_postfix(usd=f"{self.journal.spent:.4f}", refresh=False)

        options = {"base_url": self.options.base_url, "timeout": TIMEOUT}
        # The client's own retries would be sent without being logged.
        self.client = openai.AsyncOpenAI(api_key=self.api_key, max_retries=0, **options)
        with tqdm(total=total, unit="call", disable=None) as bar:
            async with self.client, asyncio.TaskGroup() as group:
                for _ in range(self.options.concurrency):
                    group.create_task(worker())
        return self.stop

    async def _ask(self, call: dict) -> list[dict]:
        """Send a call until it is answered, rejected, or given up; the calls to make instead. May raise `StopRun`."""
        mismatches = 0
        for attempt in range(ATTEMPTS):
            error = await self._send_when_affordable(call)
            if error is None:
                return []
            mismatches += isinstance(error, SchemaMismatch)
            is_refused = isinstance(error, openai.APIStatusError) and not self._is_temporary(error)
            if len(call) > 1 and (is_refused or mismatches):
                return [{key: content} for key, content in call.items() if key not in self.journal.answers]
            if is_refused or mismatches == SCHEMA_ATTEMPTS:
                replies = "" if is_refused else f"{mismatches} replies did not fit the schema, the last: "
                self.journal.reject(next(iter(call)), replies + self._without_key(error))
                break
            await self._wait(error, attempt)
        self.failures_in_a_row += 1
        if self.failures_in_a_row >= max(10, 2 * self.options.concurrency):
            raise StopRun(
                f"{self.client.base_url} gave no usable reply for the last {self.failures_in_a_row} calls "
                f"({self._without_key(error)}): run the same command again when it is back, or fix the cause and add "
                "--retry_quarantined"
            )
        return []

    async def _send_when_affordable(self, call: dict) -> Exception | None:
        """Send a call as soon as the budget has room for it; what went wrong, if anything did."""
        messages = self.messages(call)
        while not self.stop:
            try:
                number = self.journal.reserve(self.most_cost(messages))
            except BudgetExceeded:  # calls in flight may turn out cheaper than what is reserved for them
                if not self.in_flight:
                    raise
                await asyncio.wait(self.in_flight, return_when=asyncio.FIRST_COMPLETED)
            else:
                task = asyncio.create_task(self._send(call, messages, number))
                self.in_flight.add(task)
                task.add_done_callback(self.in_flight.discard)
                return await task
        raise self.stop

    async def _send(self, call: dict, messages: list[dict], number: int) -> Exception | None:
        cost = most = self.journal.open_calls[number]
        answers, usage, error = {}, None, None
        try:
            reply = await self.client.chat.completions.create(messages=messages, **self.same_in_all_calls)
            choice, text = reply.choices[0], reply.choices[0].message.content or ""
        except openai.APIStatusError as refusal:  # is not charged
            error, cost = refusal, most if refusal.status_code in GATEWAY_TIMEOUT_STATUS else 0.0
        except (openai.APIError, *MALFORMED) as failure:  # charged, unless nothing was sent
            error, cost = failure, 0.0 if type(failure.__cause__).__name__ in CONNECTION_FAILED else most
        else:
            counts = [getattr(reply.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
            if all(isinstance(count, int) and count >= 0 for count in counts):  # else it may have cost the most
                cost, share = self.options.cost(*counts), [count / len(call) for count in counts]
                usage = {"input_tokens": share[0], "output_tokens": share[1]}
            answers, error = self._answers(call, choice, text)
        reason = f"{type(error).__name__}: {self._without_key(error)}" if error else None
        self.journal.settle(number, cost, answers, usage=usage, error=reason)
        self.failures_in_a_row = 0 if answers else self.failures_in_a_row
        if cost > most:
            raise StopRun(
                f"a call to {self.client.base_url} cost {cost:.4f} USD, more than {most:.4f}: the endpoint ignores "
                f"the limit of {self.options.max_tokens} tokens a reply, so that no cap would hold; raise --max_tokens"
            )
        return error

    def _answers(self, call: dict, choice, text: str) -> tuple[dict[str, dict], SchemaMismatch | None]:
        """The valid answers by key, and why others are missing: what the endpoint says of it, else what was read."""
        try:
            found = self.read(call, text)
        except MALFORMED as error:
            found = dict.fromkeys(call, str(error))
        answers = {key: answer for key, answer in found.items() if not isinstance(answer, str)}
        wrong = next((answer for answer in found.values() if isinstance(answer, str)), None)
        if wrong is None:
            return answers, None
        if choice.finish_reason == "length":
            wrong = f"the reply was cut off after {self.options.max_tokens} tokens; raise --max_tokens"
        elif choice.finish_reason == "content_filter":
            wrong = "the endpoint's filter cut the reply off"
        elif refusal := getattr(choice.message, "refusal", None):
            wrong = f"the model refuses: {refusal}"
        return answers, SchemaMismatch(wrong.replace("\n", " "))

    def _without_key(self, error: Exception) -> str:
        """An endpoint's message without the API key, which some of them repeat."""
        return str(error).replace(self.api_key, "<key>") if len(self.api_key) >= SHORTEST_KEY else str(error)

    def _is_temporary(self, error: openai.APIStatusError) -> bool:
        """Whether a retry may help, else the content is refused. Raises `StopRun` if all calls would fail."""
        status = error.status_code
        if (status in TEMPORARY_STATUS or status >= 500) and error.code != QUOTA_EXHAUSTED:
            return True
        if status in CONTENT_STATUS and self.journal.answers:
            return False
        raise StopRun(
            f"{self.client.base_url} refused the call: {self._without_key(error)}; check the key (OPENAI_API_KEY), "
            f"the model ({self.options.model}), the account, and whether the endpoint supports structured outputs"
        ) from error

    async def _wait(self, error: Exception, attempt: int):
        """Exponential backoff with jitter, at least the seconds of a Retry-After header."""
        wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
        if isinstance(error, openai.APIStatusError):
            with suppress(ValueError):  # a date instead of seconds
                wait = max(wait, float(error.response.headers.get("retry-after", 0)))
        if wait > LONGEST_RETRY_AFTER:
            raise StopRun(f"{self.client.base_url} asks to wait for {wait:.0f} seconds: run the same command then")
        await asyncio.sleep(wait)
