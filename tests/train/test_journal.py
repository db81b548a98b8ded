"""The journal of paid calls: whatever fails and whenever the process dies, nothing is paid twice and the cap holds."""

import asyncio
import json
import os
from collections import Counter
from random import Random

import openai
import pytest
from fault_server import FAULTS, INPUT_TOKENS, OUTPUT_TOKENS, FaultServer
from pydantic import BaseModel, ConfigDict

from granulon.train.controller import journal as module
from granulon.train.controller.journal import ApiArguments, BudgetExceeded, Endpoint, Journal, StopRun, call_key

PRICES = [1.0, 4.0]
PROMPT = "You label questions. " * 200  # as many bytes as a real prompt's tokens at least


class Label(BaseModel):
    model_config = ConfigDict(extra="forbid")
    reason: str
    probabilities: dict[str, float]


class ListEndpoint(Endpoint):
    """Asks several questions in one call; the numbers of the labels are those of the questions in the call."""

    def messages(self, call):
        asked = [{"number": number, "question": question} for number, question in enumerate(call.values())]
        return [{"role": "system", "content": PROMPT}, {"role": "user", "content": json.dumps(asked)}]

    def read(self, call, text):
        labels = {label["number"]: label for label in json.loads(text)["labels"] if label}
        return {key: labels.get(number, "no label") for number, key in enumerate(call)}


def key(question):
    return call_key(question, "m", "sha")


def messages(question):
    return [{"role": "system", "content": PROMPT}, {"role": "user", "content": json.dumps(question)}]


def options(server=None, max_cost=float("inf"), concurrency=8, max_tokens=100):
    address = server.base_url if server else None
    return ApiArguments(
        model="m", base_url=address, prices=PRICES, max_cost=max_cost, concurrency=concurrency, max_tokens=max_tokens
    )


def ask(server, path, questions, attempts=8, schema_attempts=8, per_call=1, **settings):
    """What a run of the annotator does: (why it stopped, keys answered, keys rejected, spent)."""
    given = options(server, **settings)
    calls = ({key(question): messages(question)} for question in questions)
    if per_call > 1:
        groups = [questions[start : start + per_call] for start in range(0, len(questions), per_call)]
        calls = ({key(question): question for question in group} for group in groups)
    with pytest.MonkeyPatch.context() as patch, Journal(path, given.max_cost) as journal:
        patch.setattr(module, "ATTEMPTS", attempts)
        patch.setattr(module, "SCHEMA_ATTEMPTS", schema_attempts)
        patch.setattr(module, "TIMEOUT", 0.5)
        stop = (ListEndpoint if per_call > 1 else Endpoint)(given, journal, Label).ask_all(calls, len(questions))
        return stop, dict(journal.answers), dict(journal.rejected), journal.spent


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 0.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "calls.jsonl"


def test_every_answer_is_there_and_costs_what_was_used(path):
    questions = [f"q{number}" for number in range(20)]
    with FaultServer() as server:
        stop, answers, rejected, spent = ask(server, path, questions)
    assert stop is None and not rejected and len(answers) == 20
    assert spent == pytest.approx(server.cost(PRICES))
    assert max(server.asked.values()) == 1
    entry = answers[key("q3")]
    assert entry["answer"] == server.answer("q3") and entry["usage"]["input_tokens"] == INPUT_TOKENS


@pytest.mark.parametrize("fault", FAULTS)
def test_after_each_kind_of_failure_the_answer_comes_and_nothing_is_paid_that_is_not_counted(path, fault):
    questions = [f"q{number}" for number in range(12)]
    with FaultServer(fault_share=0.5, faults=(fault,)) as server:
        stop, answers, _, spent = ask(server, path, questions, attempts=20, schema_attempts=20)
    assert stop is None and len(answers) == 12
    assert server.happened[fault] > 0
    assert server.cost(PRICES) <= spent + 1e-9
    if fault in ("429", "500", "schema"):
        assert spent == pytest.approx(server.cost(PRICES)), "what such a call costs is known"


def test_a_second_run_sends_nothing(path):
    with FaultServer() as server:
        ask(server, path, ["a", "b"])
        before = path.read_bytes()
        _, answers, _, _ = ask(server, path, ["a", "b"])
    assert sum(server.asked.values()) == 2 and len(answers) == 2
    assert path.read_bytes() == before


def test_another_model_prompt_or_asking_is_another_call():
    keys = {call_key(*identity) for identity in [("q", "m", "s"), ("q", "n", "s"), ("q", "m", "t"), ("p", "m", "s")]}
    assert len(keys | {call_key("q", "m", "s", "again")}) == 5
    assert call_key("q", "m", "s") in keys


def test_no_more_calls_than_allowed_are_under_way(path):
    with FaultServer(hold=0.05) as server:
        ask(server, path, [f"q{number}" for number in range(30)], concurrency=3, attempts=30)
    assert 2 <= server.most_under_way <= 3


@pytest.mark.parametrize("per_call", [1, 3])
def test_the_cap_is_never_exceeded_and_what_was_answered_stays(path, per_call):
    questions = [f"q{number}" for number in range(200 * per_call)]
    cap = 0.1
    with FaultServer(fault_share=0.3) as server:
        server.label_fault_share = 0.1
        stop, answers, _, spent = ask(server, path, questions, max_cost=cap, per_call=per_call)
        assert isinstance(stop, BudgetExceeded) and "--max_cost" in str(stop)
        assert server.cost(PRICES) <= spent <= cap
        assert 0 < len(answers) < len(questions)
        sent = sum(server.asked.values())
        stop, answers, _, _ = ask(server, path, questions, max_cost=cap, per_call=per_call)
        assert isinstance(stop, BudgetExceeded) and sum(server.asked.values()) == sent
        more = {"attempts": 30, "schema_attempts": 30, "per_call": per_call}
        stop, answers, _, spent = ask(server, path, questions, max_cost=100, **more)
    assert stop is None and len(answers) == len(questions)
    assert server.cost(PRICES) <= spent


def test_calls_under_way_give_back_what_they_do_not_need_before_the_budget_counts_as_spent(path):
    one = options().cost(INPUT_TOKENS, OUTPUT_TOKENS)
    with FaultServer() as server:
        most = Endpoint(options(), None, Label).most_cost(messages("q00"))
        stop, answers, _, spent = ask(
            server, path, [f"q{number:02d}" for number in range(10)], max_cost=9 * one + most, concurrency=8
        )
    assert most > 2 * one
    assert stop is None and len(answers) == 10 and spent == pytest.approx(10 * one)


def test_replies_that_miss_the_schema_again_and_again_are_rejected_and_not_asked_for_again(path):
    with FaultServer() as server:
        server.always["bad"] = "schema"
        stop, answers, rejected, spent = ask(server, path, ["good", "bad"], schema_attempts=3)
        assert stop is None and len(answers) == 1 and server.asked["bad"] == 3
        (reason,) = rejected.values()
        assert "3 replies did not fit the schema" in reason
        assert spent == pytest.approx(server.cost(PRICES))
        ask(server, path, ["good", "bad"])
        assert server.asked["bad"] == 3


def test_a_content_that_the_endpoint_refuses_is_rejected_and_the_others_are_sent(path):
    with FaultServer() as server:
        ask(server, path, ["first"])
        server.always["forbidden"] = "400"
        stop, answers, rejected, _ = ask(server, path, ["forbidden", "second"])
    assert stop is None and len(answers) == 2 and len(rejected) == 1
    assert server.asked["forbidden"] == 1


@pytest.mark.parametrize("fault", ["400", "401"])
def test_a_refusal_that_concerns_every_call_stops_the_run_at_once(path, fault):
    with FaultServer(fault_share=1.0, faults=(fault,)) as server:
        stop, answers, rejected, spent = ask(server, path, [f"q{number}" for number in range(50)], concurrency=2)
    assert "refused the call" in str(stop) and "OPENAI_API_KEY" in str(stop)
    assert sum(server.asked.values()) <= 4 and not answers and not rejected and spent == 0


def test_an_account_without_quota_stops_the_run_at_once(path):
    with FaultServer() as server:
        server.always["no quota"] = "429"
        stop, _, _, _ = ask(server, path, ["no quota"], concurrency=1)
    assert isinstance(stop, StopRun) and server.asked["no quota"] == 1


def test_an_endpoint_that_is_gone_stops_the_run_after_a_while(path):
    with FaultServer() as server:
        pass
    stop, answers, rejected, spent = ask(
        server, path, [f"q{number}" for number in range(100)], attempts=2, concurrency=4, max_cost=1.0
    )
    assert "gave no usable reply for the last" in str(stop) and "run the same command again" in str(stop)
    assert not answers and not rejected and spent == 0, "nothing was sent, and so nothing can have been paid"


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": float("nan")},
        {"prompt_tokens": -(10**9)},
        {"completion_tokens": None},
        {"completion_tokens": "many"},
    ],
    ids=["nan", "negative", "null", "text"],
)
def test_a_count_of_tokens_that_is_none_costs_the_most_and_keeps_the_answer(path, usage):
    with FaultServer() as server:
        server.change = lambda reply: reply["usage"].update(usage)
        stop, answers, _, spent = ask(server, path, [f"q{number}" for number in range(60)], max_cost=0.1)
        assert isinstance(stop, BudgetExceeded) and 0 < len(answers) < 60
        assert sum(server.asked.values()) == len(answers)
        assert server.cost(PRICES) < spent <= 0.1


def test_an_endpoint_that_writes_more_than_it_may_stops_the_run_since_no_cap_would_hold(path):
    with FaultServer() as server:
        server.change = lambda reply: reply["usage"].update(completion_tokens=10**5)
        stop, answers, _, _ = ask(server, path, [f"q{number}" for number in range(60)], max_cost=9.0, concurrency=2)
    assert "ignores the limit of 100 tokens a reply" in str(stop) and "--max_tokens" in str(stop)
    assert 1 <= len(answers) == sum(server.asked.values()) <= 3


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"finish_reason": "length", "message": {"content": '{"rea'}}, "cut off after 100 tokens; raise --max_tokens"),
        ({"finish_reason": "content_filter", "message": {"content": None}}, "the endpoint's filter cut"),
        ({"message": {"content": None, "refusal": "I had rather not"}}, "the model refuses: I had rather not"),
    ],
    ids=["cut", "filtered", "refused"],
)
def test_a_model_that_never_fits_the_schema_stops_early_with_the_reason(path, change, reason):
    questions = [f"q{number}" for number in range(100)]
    with FaultServer() as server:
        server.change = lambda reply: reply["choices"][0].update(change)
        stop, answers, rejected, _ = ask(server, path, questions, concurrency=4, schema_attempts=2)
        assert "gave no usable reply for the last" in str(stop) and reason in str(stop)
        assert not answers and 10 <= len(rejected) <= 14 and reason in next(iter(rejected.values()))
        server.change = lambda reply: None
        stop, answers, again, _ = ask(server, path, questions, concurrency=4)
    assert stop is None and again == rejected and len(answers) + len(rejected) == 100


def test_a_question_that_is_given_twice_is_asked_once(path):
    with FaultServer() as server:
        stop, answers, _, _ = ask(server, path, ["a", "b"] * 10)
    assert stop is None and len(answers) == 2 and max(server.asked.values()) == 1


def test_an_endpoint_that_repeats_the_key_does_not_bring_it_into_the_journal_or_the_message(path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    with FaultServer(fault_share=1.0, faults=("401",)) as server:
        stop, _, _, _ = ask(server, path, ["q"])
        assert server.keys == {"secret-key"}
    assert "<key>" in str(stop) and "secret-key" not in str(stop)
    assert "<key>" in path.read_text() and "secret-key" not in path.read_text()


def test_an_endpoint_that_asks_to_wait_for_hours_stops_the_run(path):
    with FaultServer(fault_share=1.0, faults=("429",)) as server:
        server.retry_after = "86400"
        stop, _, rejected, spent = ask(server, path, ["q"])
    assert "asks to wait for 86400 seconds" in str(stop) and not rejected and spent == 0


@pytest.mark.parametrize("status, share", [(503, 0.0), (504, 1.0), (408, 1.0)])
def test_what_a_gateway_gives_up_waiting_for_counts_as_paid(path, status, share):
    with FaultServer(fault_share=1.0, faults=(str(status),)) as server:
        _, _, _, spent = ask(server, path, ["q"], attempts=1)
    assert spent == pytest.approx(share * entries(path)[0]["cost"]) and entries(path)[0]["cost"] > 0


def test_the_wait_grows_and_is_never_shorter_than_the_endpoint_asks_for(path, monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    monkeypatch.setattr(module, "FIRST_WAIT", 1.0)
    error = openai.RateLimitError.__new__(openai.RateLimitError)
    error.response = type("Response", (), {"headers": {"retry-after": "7"}})
    endpoint = Endpoint(options(), None, Label)
    for attempt in range(9):
        asyncio.run(endpoint._wait(ValueError("broken"), attempt))
    assert all(0.5 * min(2**n, 60) <= wait <= min(2**n, 60) for n, wait in enumerate(waits))
    asyncio.run(endpoint._wait(error, 0))
    assert waits[-1] == 7


class Killed(BaseException):
    pass


class DeadAfter:
    """Lets a process write so many times to the journal, and no more; the last write may be torn."""

    def __init__(self, monkeypatch, writes, torn=False):
        self.left, self.torn = writes, torn
        self.write = os.write
        monkeypatch.setattr(module.os, "write", self)

    def __call__(self, file, line):
        self.left -= 1
        if self.left < 0:
            if self.torn and self.left == -1:
                self.write(file, line[: len(line) // 2])
            raise Killed
        return self.write(file, line)


def killed(server, path, questions, monkeypatch, writes, torn, **settings):
    """A run whose process dies at a write; whether it did."""
    with monkeypatch.context() as patch:
        DeadAfter(patch, writes, torn)
        try:
            ask(server, path, questions, **settings)
        except BaseExceptionGroup as group:
            assert group.subgroup(Killed)
            return True
        except Killed:
            return True
    return False


@pytest.mark.parametrize("per_call", [1, 3])
@pytest.mark.parametrize("torn", [False, True], ids=["between writes", "within a write"])
def test_killed_at_any_write_no_answer_in_the_journal_is_asked_for_again(path, monkeypatch, torn, per_call):
    questions = [f"q{number}" for number in range(5 * per_call)]
    writes = 0
    while True:
        path.unlink(missing_ok=True)
        with FaultServer(fault_share=0.3, faults=("500", "half", "schema"), seed=1) as server:
            server.label_fault_share = 0.2
            died = killed(server, path, questions, monkeypatch, writes, torn, concurrency=2, per_call=per_call)
            journalled = answered_questions(path, questions)
            asked = Counter(server.asked)
            stop, answers, _, spent = ask(server, path, questions, max_cost=1.0, concurrency=2, per_call=per_call)
            again = server.asked - asked
        assert stop is None and len(answers) == len(questions), f"killed at write {writes}"
        assert not journalled & set(again), f"killed at write {writes}"
        assert server.cost(PRICES) <= spent <= 1.0
        if not died:
            break
        writes += 1
    assert writes >= 10


def answered_questions(path, questions):
    with Journal(path) as journal:
        return {question for question in questions if key(question) in journal.answers}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_thousand_questions_survive_faults_and_kills(path, monkeypatch, seed):
    """No question lost, no journalled call repeated, the cap never exceeded."""
    questions = [f"q{number} of {seed}" for number in range(1000)]
    random = Random(seed)
    cap = 4.0
    with FaultServer(fault_share=0.25, seed=seed, faults=tuple(f for f in FAULTS if f != "late")) as server:
        for _ in range(12):
            journalled, asked = answered_questions(path, questions), Counter(server.asked)
            killed(server, path, questions, monkeypatch, random.randint(1, 600), random.random() < 0.5, max_cost=cap)
            assert not journalled & set(server.asked - asked), "a journalled call was repeated"
            with Journal(path) as journal:
                assert server.cost(PRICES) <= journal.spent <= cap
        journalled, asked = answered_questions(path, questions), Counter(server.asked)
        stop, answers, rejected, spent = ask(server, path, questions, max_cost=20.0, attempts=40, schema_attempts=40)
        assert not journalled & set(server.asked - asked)
        assert server.cost(PRICES) <= spent <= 20.0
    assert stop is None and len(answers) == 1000 and not rejected
    answered = Counter(known for entry in entries(path) for known in entry.get("answers", ()))
    assert set(answered.values()) == {1}


def test_two_processes_do_not_share_a_journal(path):
    with Journal(path):
        with pytest.raises(ValueError, match="in use by another process"):
            Journal(path)
    Journal(path).close()


def test_a_truncated_last_line_is_removed_and_a_damaged_one_is_reported(path):
    with Journal(path) as journal:
        journal.settle(journal.reserve(0.5), 0.25, {"k": {"a": 1}})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "sent", "ca')
    with Journal(path) as journal:
        assert journal.spent == 0.25 and journal.answers["k"]["answer"] == {"a": 1}
    assert path.read_bytes() == whole
    for damage, message in ((b"nonsense\n", "is not JSON"), (b'{"a": 1}\n', "is not a journal entry")):
        path.write_bytes(whole + damage + whole)
        with pytest.raises(ValueError, match=f"calls.jsonl:3 {message}"):
            Journal(path)


def test_a_call_whose_end_is_not_known_counts_in_full(path):
    with Journal(path) as journal:
        journal.reserve(0.5)
    with Journal(path, max_cost=0.9) as journal:
        assert journal.spent == 0.5
        with pytest.raises(BudgetExceeded, match="0.5000 USD of 0.9 are spent, and the next call may cost 0.5000"):
            journal.reserve(0.5)


def test_a_full_disk_stops_the_run_and_leaves_a_journal_that_can_be_read(path, monkeypatch):
    with Journal(path) as journal:
        journal.reserve(0.5)
        write = os.write
        monkeypatch.setattr(module.os, "write", lambda file, line: write(file, line[:10]))
        with pytest.raises(StopRun, match="cannot be written .10 of .* make room"):
            journal.reserve(0.5)
        monkeypatch.undo()
        journal.reserve(0.5)
    assert [entry["call"] for entry in entries(path)] == [1, 2]


def test_a_disk_that_fails_after_the_write_leaves_a_journal_that_agrees_with_its_file(path, monkeypatch):
    def fails(file):
        raise OSError("input/output error")

    with Journal(path) as journal:
        monkeypatch.setattr(module.os, "fsync", fails)
        with pytest.raises(StopRun, match="input/output error"):
            journal.reserve(0.5)
        monkeypatch.undo()
        assert journal.spent == 0 and journal.reserve(0.25) == 1
    with Journal(path) as journal:
        assert journal.spent == 0.25


@pytest.mark.parametrize("cap", [float("nan"), -1.0])
def test_a_cap_that_would_not_hold_is_refused(path, cap):
    with pytest.raises(ValueError, match="expected 0 or more"):
        options(max_cost=cap)
    with Journal(path, cap) as journal, pytest.raises(BudgetExceeded):
        journal.reserve(0.1)
