"""Paid calls of a language model, each made once: a journal that survives any crash, a cost cap, retries.

A call is written down before it is sent, with the most it can cost, and again when its reply is there, with what it
did cost. Whatever happens in between, a later run knows both what it has and what it may have paid for: a reply that
is in the journal is not asked for again, and a call whose end is not known counts in full, so that the cap holds over
all runs together.

Retries are made here and not by the openai client, whose own would be sent without being written down.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import openai
from pydantic import BaseModel, ValidationError

SENT, ANSWERED, FAILED, REJECTED = "sent", "answered", "failed", "rejected"
TRY_AGAIN = (408, 409, 425, 429)  # and all from 500 on
OF_THE_CONTENT = (400, 413, 422)  # one content may be at fault, unless nothing was ever answered
NO_QUOTA = "insufficient_quota"  # comes as 429, and no waiting helps
LONGEST_WAIT = 60.0  # seconds
TEMPLATE_TOKENS = 64  # what a chat template may add to the text of a call


class StopRun(Exception):
    """No further call makes sense; the message says why and what to do. What was answered is in the journal."""


class BudgetExceeded(StopRun):
    """The next call might cost more than is left."""


class Rejected(Exception):
    """This content gets no usable reply; the message is the reason."""


@dataclass(frozen=True)
class Prices:
    """In USD per million tokens."""

    input: float
    output: float

    def of(self, input_tokens: int, output_tokens: int) -> float:
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


@dataclass
class Request:
    """Something to be asked: `messages` as the endpoint takes them; `key` names content, model and prompt."""

    key: str
    messages: list[dict]


def call_key(content, model: str, prompt_sha: str, variant: str = "") -> str:
    """What makes two calls the same: content (JSON), model, the hash of the prompt, and which of several askings."""
    identity = json.dumps([content, model, prompt_sha, variant], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(identity.encode()).hexdigest()


class Journal:
    """
    An append-only file of calls, open in one process at a time.

    Args:
        path: the file; made if it does not exist. A last line that a crash cut short is removed.
        max_cost: the cap in USD over everything in the file; None is none.

    Raises:
        ValueError: the file is open elsewhere, or holds a line that no journal wrote.
    """

    def __init__(self, path: str | Path, max_cost: float | None = None):
        self.path, self.max_cost = Path(path), max_cost
        self.answers, self.rejected = {}, {}  # by key: the entry, the reason
        self.open_calls, self.settled = {}, 0.0  # most that each may cost; cost of all whose end is known
        self.calls = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._read()
        except ValueError:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        os.close(self.file)

    @property
    def spent(self) -> float:
        """USD, calls whose end is not known in full."""
        return self.settled + sum(self.open_calls.values())

    def reserve(self, key: str, most: float) -> int:
        """Write down that a call is about to be sent; its number. Raises `BudgetExceeded`."""
        if self.max_cost is not None and self.spent + most > self.max_cost:
            raise BudgetExceeded(
                f"{self.spent:.4f} USD of {self.max_cost:g} are spent, and the next call may cost {most:.4f}: run the "
                "same command with a higher --max_cost to go on"
            )
        self._write({"event": SENT, "call": self.calls + 1, "key": key, "cost": most})
        return self.calls

    def settle(self, call: int, key: str, cost: float, answer: dict | None = None, **more):
        """Write down how a call ended: with an answer, or without."""
        event = FAILED if answer is None else ANSWERED
        self._write({"event": event, "call": call, "key": key, "cost": cost, "answer": answer, **more})

    def reject(self, key: str, reason: str):
        """Write down that a content gets no usable reply."""
        self._write({"event": REJECTED, "key": key, "reason": reason})

    def _write(self, entry: dict):
        line = json.dumps(entry).encode() + b"\n"
        try:
            written = os.write(self.file, line)
            if written < len(line):  # a full disk: no half line may stand before another
                os.ftruncate(self.file, os.fstat(self.file).st_size - written)
                raise OSError(f"{written} of {len(line)} bytes were written")
            os.fsync(self.file)
        except OSError as error:
            raise StopRun(f"{self.path} cannot be written ({error}); make room and run the same command") from error
        self._take(entry)

    def _take(self, entry: dict):
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

    def _lock(self):
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self.path} is in use by another process; wait for it, or name another output"
            ) from error

    def _read(self):
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}:{number} is no line of a journal ({line[:60]!r}); restore the file, or move it away "
                    "and pay again"
                ) from error
        os.ftruncate(self.file, whole)


@dataclass
class Endpoint:
    """
    An OpenAI-compatible endpoint that answers in the form of a schema, through a journal.

    Args:
        client: with `max_retries=0`.
        model: the name the endpoint knows.
        journal: where calls are written down.
        schema: pydantic model of the reply; with `extra="forbid"` and without defaults, as strict schemas must be.
        prices: of the model.
        max_tokens: the most that a reply may have.
        attempts: how often a content is sent before it is left for another run.
        schema_attempts: how many replies may miss the schema before the content is rejected.
        first_wait: seconds before the second attempt, doubled for each further one.
        options: further arguments of the call, such as `temperature`.
    """

    client: openai.AsyncOpenAI
    model: str
    journal: Journal
    schema: type[BaseModel]
    prices: Prices
    max_tokens: int = 512
    attempts: int = 6
    schema_attempts: int = 3
    first_wait: float = 1.0
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.client.max_retries:
            raise ValueError(f"the client retries {self.client.max_retries} times by itself; pass max_retries=0")
        schema = {"name": "reply", "strict": True, "schema": self.schema.model_json_schema()}
        self.response_format = {"type": "json_schema", "json_schema": schema}
        self.settled = asyncio.Condition()
        self.under_way, self.left_in_a_row = 0, 0
        self.stop: StopRun | None = None

    def most_cost(self, messages: list[dict]) -> float:
        """What a call can cost at most: no tokenizer makes more tokens of a text than it has bytes."""
        text = json.dumps([messages, self.response_format], ensure_ascii=False)
        return self.prices.of(len(text.encode()) + TEMPLATE_TOKENS, self.max_tokens)

    async def ask_all(
        self, requests: Iterable[Request], concurrency: int = 16, done: Callable[[Request], None] = lambda _: None
    ) -> StopRun | None:
        """
        Ask for what the journal does not hold yet; the answers are in the journal.

        Args:
            requests: at most `concurrency` of them are under way at once.
            done: called after each, whatever came of it.

        Returns:
            why it stopped before the end, if it did.
        """
        waiting, patience = iter(requests), max(10, 2 * concurrency)

        async def work():
            for request in waiting:
                if self.stop:
                    return
                try:
                    self.left_in_a_row = 0 if await self.ask(request) else self.left_in_a_row + 1
                except Rejected:
                    self.left_in_a_row = 0
                except StopRun as stop:
                    self.stop = self.stop or stop
                    return
                done(request)
                if self.left_in_a_row >= patience:
                    self.stop = StopRun(
                        f"{self.client.base_url} gave no reply for the last {self.left_in_a_row} contents: run the "
                        "same command again when it is back"
                    )

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
        return self.stop

    async def ask(self, request: Request) -> dict | None:
        """
        The journal's entry with the reply (`answer`, `usage`, `cost`, `at`); None if all attempts failed.

        Raises:
            Rejected: the content gets no usable reply, now or in an earlier run.
            StopRun: no other content would get one either.
        """
        key, missed = request.key, 0
        for attempt in range(self.attempts):
            if key in self.journal.answers or self.stop:
                break
            if key in self.journal.rejected:
                raise Rejected(self.journal.rejected[key])
            outcome = await self._call(request)
            if isinstance(outcome, _Missed):
                missed += 1
                if missed == self.schema_attempts:
                    self.journal.reject(key, f"{missed} replies were not what was asked for, the last: {outcome}")
            elif isinstance(outcome, openai.APIStatusError):
                self._judge(outcome, key)
            if outcome is not None:
                await self._wait(outcome, attempt)
        if key in self.journal.rejected:
            raise Rejected(self.journal.rejected[key])
        return self.journal.answers.get(key)

    async def _call(self, request: Request) -> Exception | None:
        """One call, written down before and after; what went wrong, if anything."""
        call = await self._reserve(request)
        settle = partial(self.journal.settle, call, request.key)
        try:
            reply = await self.client.chat.completions.create(
                model=self.model,
                messages=request.messages,
                response_format=self.response_format,
                max_completion_tokens=self.max_tokens,
                **self.options,
            )
            usage, cost = self._usage(reply, self.journal.open_calls[call])
            answer = self.schema.model_validate_json(reply.choices[0].message.content or "").model_dump()
            settle(cost, answer, usage=usage, at=datetime.now(UTC).isoformat(timespec="seconds"))
            return None
        except openai.APIStatusError as error:
            settle(0.0, reason=str(error))  # a call that is refused is not paid for
            return error
        except ValidationError as error:
            settle(cost, reason=str(error))
            return _Missed(str(error).replace("\n", " "))
        except (openai.APIError, ValueError, AttributeError, LookupError, TypeError) as error:
            # Broken off, too late, or not what an endpoint says: it may have been paid for.
            settle(self.journal.open_calls[call], reason=repr(error))
            return error
        finally:
            async with self.settled:
                self.under_way -= 1
                self.settled.notify_all()

    async def _reserve(self, request: Request) -> int:
        """Calls under way hold more of the budget than they will need: what does not fit yet waits for them."""
        most = self.most_cost(request.messages)
        async with self.settled:
            while True:
                try:
                    call = self.journal.reserve(request.key, most)
                except BudgetExceeded:
                    if not self.under_way:
                        raise
                    await self.settled.wait()
                else:
                    self.under_way += 1
                    return call

    def _usage(self, reply, most: float) -> tuple[dict | None, float]:
        """Tokens and USD of a reply; without a count, the most it can have cost."""
        if reply.usage is None:
            return None, most
        usage = {"input_tokens": reply.usage.prompt_tokens, "output_tokens": reply.usage.completion_tokens}
        return usage, self.prices.of(**usage)

    def _judge(self, error: openai.APIStatusError, key: str):
        """Nothing where trying again may help; else rejects the content or raises `StopRun`."""
        status = error.status_code
        if (status in TRY_AGAIN or status >= 500) and error.code != NO_QUOTA:
            return
        if status in OF_THE_CONTENT and self.journal.answers:
            self.journal.reject(key, str(error))
            return
        raise StopRun(
            f"{self.client.base_url} refused the call: {error}; look at the key (OPENAI_API_KEY), the name of the "
            f"model ({self.model}), the account, and whether it takes structured outputs"
        ) from error

    async def _wait(self, error: Exception, attempt: int):
        """Longer after each attempt, with jitter; never shorter than the endpoint asks for."""
        wait = min(self.first_wait * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
        if isinstance(error, openai.APIStatusError):
            try:
                wait = max(wait, float(error.response.headers.get("retry-after", 0)))
            except ValueError:  # a date: the back-off must do
                pass
        await asyncio.sleep(wait)


class _Missed(Exception):
    """A reply that was paid for and misses the schema."""
