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
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import openai
from pydantic import BaseModel, ValidationError
from tqdm import tqdm

SENT, ANSWERED, FAILED, REJECTED = "sent", "answered", "failed", "rejected"
TRY_AGAIN = (408, 409, 425, 429)  # and all from 500 on
OF_THE_CONTENT = (400, 413, 422)  # one content may be at fault, unless nothing was ever answered
NO_QUOTA = "insufficient_quota"  # comes as 429, and no waiting helps
GATEWAY_GAVE_UP = (408, 504, 524)  # while the model may have worked, for money
NEVER_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol")  # of httpx, and of httpx2
LONGEST_WAIT = 60.0  # seconds, of our own
LONGEST_ASKED = 600.0  # seconds; who asks for more is asked again by another run
SHORTEST_KEY = 8  # letters; what endpoints of one's own take for a key may be any word
TEMPLATE_TOKENS = 64  # what a chat template may add to the text of a call
FIRST_WAIT = 1.0  # seconds before the second attempt, doubled for each further one
TIMEOUT = 300.0  # seconds to wait for a reply; a model that reasons takes long
CHARACTERS_PER_TOKEN = 4  # of English, for the estimate; the cap counts a token for each byte


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
        ValueError: the file is open elsewhere, or holds a line that no journal wrote; a cap that is no number.
    """

    def __init__(self, path: str | Path, max_cost: float | None = None):
        if max_cost is not None and not max_cost >= 0:
            raise ValueError(f"the cap is {max_cost} USD; expected 0 or more")
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
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        try:
            written = os.write(self.file, line)
            if written < len(line):  # a full disk: no half line may stand before another
                os.ftruncate(self.file, os.fstat(self.file).st_size - written)
                raise OSError(f"{written} of {len(line)} bytes were written")
            self._take(entry)  # the line stands there from now on, whether or not it reaches the disk
            os.fsync(self.file)
        except OSError as error:
            raise StopRun(f"{self.path} cannot be written ({error}); make room and run the same command") from error

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
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.client.max_retries:
            raise ValueError(f"the client retries {self.client.max_retries} times by itself; pass max_retries=0")
        schema = {"name": "reply", "strict": True, "schema": self.schema.model_json_schema()}
        self.response_format = {"type": "json_schema", "json_schema": schema}
        self.settled = asyncio.Condition()
        self.under_way, self.in_vain = 0, 0  # calls; contents without a reply since the last reply
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
            requests: at most `concurrency` of them are under way at once; those of one key are one.
            done: called after each, whatever came of it.

        Returns:
            why it stopped before the end, if it did.
        """
        waiting, taken, patience = iter(requests), set(), max(10, 2 * concurrency)

        async def work():
            for request in waiting:
                if self.stop:
                    return
                if request.key not in taken and request.key not in self.journal.rejected:
                    taken.add(request.key)
                    try:
                        self._note(await self._ask_or_reason(request), patience)
                    except StopRun as stop:
                        self.stop = self.stop or stop
                        return
                done(request)

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
        return self.stop

    async def _ask_or_reason(self, request: Request) -> dict | str | None:
        try:
            return await self.ask(request)
        except Rejected as reason:
            return str(reason)

    def _note(self, outcome: dict | str | None, patience: int):
        """Raises `StopRun` after too many contents in a row without a reply (None) or without a usable one (why)."""
        self.in_vain = 0 if isinstance(outcome, dict) else self.in_vain + 1
        if self.in_vain < patience:
            return
        if outcome is None:
            raise StopRun(
                f"{self.client.base_url} gave no reply for the last {self.in_vain} contents: run the same command "
                "again when it is back"
            )
        raise StopRun(
            f"{self.in_vain} contents in a row got no usable reply from {self.model}, so that no more are paid for: "
            f"{outcome}; change what is at fault and add --retry_quarantined"
        )

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
        settle, most = partial(self.journal.settle, call, request.key), self.journal.open_calls[call]
        try:
            reply = await self.client.chat.completions.create(
                model=self.model,
                messages=request.messages,
                response_format=self.response_format,
                max_completion_tokens=self.max_tokens,
                **self.options,
            )
            usage, cost = self._usage(reply, most)
            answer = self.schema.model_validate_json(reply.choices[0].message.content or "").model_dump()
            settle(cost, answer, usage=usage, at=datetime.now(UTC).isoformat(timespec="seconds"))
            self._check_bound(cost, most)
            return None
        except openai.APIStatusError as error:
            # A call that is refused is not paid for.
            settle(most if error.status_code in GATEWAY_GAVE_UP else 0.0, reason=self._told(error))
            return error
        except ValidationError as error:
            missed = _Missed(self._why_missed(reply.choices[0]) or str(error).replace("\n", " "))
            settle(cost, reason=str(missed))
            self._check_bound(cost, most)
            return missed
        except (openai.APIError, ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
            # Broken off, too late, or not what an endpoint says: it may have been paid for, if it was sent.
            settle(0.0 if type(error.__cause__).__name__ in NEVER_SENT else most, reason=self._told(repr(error)))
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
                if self.stop:
                    raise self.stop
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
        counts = [getattr(reply.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            return None, most
        return dict(zip(("input_tokens", "output_tokens"), counts, strict=True)), self.prices.of(*counts)

    def _check_bound(self, cost: float, most: float):
        """No cap holds where a call can cost more than was set aside for it."""
        if self.journal.max_cost is not None and cost > most:
            raise StopRun(
                f"a call to {self.client.base_url} cost {cost:.4f} USD, of which at most {most:.4f} was expected: it "
                f"does not keep to {self.max_tokens} tokens a reply, so that no cap would hold; raise --max_tokens to "
                "what it writes"
            )

    def _why_missed(self, choice) -> str | None:
        """What the endpoint itself says of a reply that does not fit."""
        if choice.finish_reason == "length":
            return f"the reply was cut off after {self.max_tokens} tokens; raise --max_tokens"
        if choice.finish_reason == "content_filter":
            return "the endpoint's filter cut the reply off"
        refusal = getattr(choice.message, "refusal", None)
        return f"the model refuses: {self._told(refusal)}" if refusal else None

    def _told(self, error) -> str:
        """What an endpoint says, without the key, which some of them repeat."""
        key = self.client.api_key
        return str(error).replace(key, "<key>") if len(key) >= SHORTEST_KEY else str(error)

    def _judge(self, error: openai.APIStatusError, key: str):
        """Nothing where trying again may help; else rejects the content or raises `StopRun`."""
        status = error.status_code
        if (status in TRY_AGAIN or status >= 500) and error.code != NO_QUOTA:
            return
        if status in OF_THE_CONTENT and self.journal.answers:
            self.journal.reject(key, self._told(error))
            return
        raise StopRun(
            f"{self.client.base_url} refused the call: {self._told(error)}; look at the key (OPENAI_API_KEY), the "
            f"name of the model ({self.model}), the account, and whether it takes structured outputs"
        ) from error

    async def _wait(self, error: Exception, attempt: int):
        """Longer after each attempt, with jitter; never shorter than the endpoint asks for, in seconds."""
        wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
        if isinstance(error, openai.APIStatusError):
            try:
                wait = max(wait, float(error.response.headers.get("retry-after", 0)))
            except ValueError:  # a date: the back-off must do
                pass
        if wait > LONGEST_ASKED:
            raise StopRun(f"{self.client.base_url} asks to wait for {wait:.0f} seconds: run the same command then")
        await asyncio.sleep(wait)


class _Missed(Exception):
    """A reply that was paid for and misses the schema."""


def ask_with_bar(
    requests: Iterable[Request],
    total: int,
    make_endpoint: Callable[[openai.AsyncOpenAI], Endpoint],
    *,
    base_url: str | None,
    timeout: float = TIMEOUT,
    concurrency: int,
) -> StopRun | None:
    """
    `Endpoint.ask_all` for a command line: with a client, a progress bar that shows the cost, and a SIGTERM that ends
    it like Ctrl-C. The key is OPENAI_API_KEY; endpoints of one's own ask for none.
    """

    async def ask() -> StopRun | None:
        key = os.environ.get("OPENAI_API_KEY", "none")
        async with openai.AsyncOpenAI(api_key=key, base_url=base_url, timeout=timeout, max_retries=0) as client:
            endpoint = make_endpoint(client)
            with tqdm(total=total, unit="call", disable=None) as bar:

                def done(_):
                    bar.update()
                    bar.set_postfix(usd=f"{endpoint.journal.spent:.4f}", refresh=False)

                return await endpoint.ask_all(requests, concurrency, done)

    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return asyncio.run(ask())
    finally:
        signal.signal(signal.SIGTERM, previous)
