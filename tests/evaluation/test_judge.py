"""`granulon-judge`: every answer has scores or a reason for none, no paid call is repeated, no cap is exceeded."""

import asyncio
import base64
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from fault_server import INPUT_TOKENS, OUTPUT_TOKENS, FaultServer
from PIL import Image
from pydantic import ValidationError
from test_tables import make_run, write

from granulon.evaluation.judge import images, run
from granulon.evaluation.judge.reply import Verdict, cut_words, empty_verdict, segments, statistics_of
from granulon.evaluation.judge.run import MAX_WORDS, PROMPT, main
from granulon.evaluation.matrix import Entry, Matrix, read_results
from granulon.evaluation.metrics import JUDGED
from granulon.train.controller import journal

TASK = "granulon_cc12m"
OPTIONS = {"model": "m", "prices": (1.0, 4.0), "max_cost": 5.0}


class JudgeServer(FaultServer):
    """The endpoint that fails as endpoints do, which scores answers: by the text alone, so that they are known."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.shift, self.images = 0, []

    async def _exchange(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"content-length: *(\d+)", head.lower())[1])
        body = json.loads(await reader.readexactly(length))
        content = body["messages"][-1]["content"]
        if isinstance(content, list):
            self.images += [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
            content = content[-1]["text"]
        body["messages"][-1]["content"] = json.dumps(content)
        text = json.dumps(body).encode()
        again = asyncio.StreamReader()
        again.feed_data(re.sub(rb"(?i)(content-length: *)\d+", rb"\g<1>%d" % len(text), head) + text)
        again.feed_eof()
        return await super()._exchange(again, writer)

    def answer(self, question):
        parts = {name: text for name, text in json.loads(question).items() if name.startswith("segment")}
        scored = {name: self.scores(text) for name, text in parts.items()}
        return {"reason": f"`{self.shift}` apart", "whole": self.scores(question), **scored}

    def scores(self, text):
        draws = hashlib.sha256(text.encode()).digest()
        return {
            name: min(100, draw % 60 + self.shift)
            for name, draw in zip(("accuracy", "hallucination", "granularity"), draws)
        }


@pytest.fixture
def server():
    with JudgeServer() as server:
        yield server


def make_answers(count, start=0):
    return [
        {
            "id": number, "question": "What is this?", "references": [f"A thing number {number}."],
            "answer": f"It is thing {start + number}. It is red. It stands there. It is old! Is it? Yes.",
            "statistics": {},
        }
        for number in range(count)
    ]  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    """Two entries: they have the same answers to the first ten samples."""
    folder = tmp_path / "results"
    make_run(folder, Entry("one", "a"), TASK, make_answers(20))
    make_run(folder, Entry("two", "b", view="pixel"), TASK, make_answers(10) + make_answers(20, 100)[10:])
    return folder


@pytest.fixture
def judge(runs, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    monkeypatch.setattr(journal, "FIRST_WAIT", 0.0)

    def call(*more, **settings):
        main(line(runs, server, *more, **settings))
        return read_results(runs)

    return call


def line(runs, server, *more, **settings):
    values = OPTIONS | {"results": runs, "base_url": server.base_url, "sees": "reference"} | settings
    options = []
    for name, value in values.items():
        options += [f"--{name}", *(value if isinstance(value, tuple) else (value,))] if value is not None else []
    return [*map(str, options), *more]


def scores_of(results):
    return [result["judges"][name] for result in results for name in sorted(result["judges"])]


def test_every_answer_and_its_segments_are_scored_and_equal_answers_share_a_call(judge, server):
    results = judge()
    assert len(server.asked) == 30 and set(server.asked.values()) == {1}
    for judged in scores_of(results):
        assert judged["waiting"] == 0 and len(judged["samples"]) == 20 and judged["model"] == "m"
        assert len(judged["prompt_sha"]) == 64 and judged["judge"].startswith(f"judge-m-{judged['prompt_sha'][:12]}")
        assert set(judged["metrics"]) == {
            f"{name}{part}" for name in JUDGED for part in ("", *"_1 _2 _3 _4 _5".split())
        }
        whole = judged["metrics"]["gptscore"]
        scores = [sample["verdict"]["whole"]["accuracy"] for sample in judged["samples"]]
        assert whole["value"] == pytest.approx(np.mean(scores)) and whole["low"] < whole["value"] < whole["high"]
        assert whole["n"] == 20 and not judged["metrics"]["gpt_hallucination"]["higher_is_better"]


def test_a_call_has_the_prompt_a_strict_schema_and_the_segments_and_the_key_is_never_written(judge, server, runs):
    judge()
    body = server.bodies[-1]
    assert body["messages"][0]["content"] == PROMPT.read_text()
    schema = body["response_format"]["json_schema"]
    assert schema["strict"] and schema["schema"]["additionalProperties"] is False
    assert list(schema["schema"]["properties"]) == ["reason", "whole", *(f"segment_{n}" for n in range(1, 6))]
    asked = json.loads(json.loads(body["messages"][1]["content"]))
    assert list(asked) == ["question", "reference", *(f"segment_{n}" for n in range(1, 6))]
    assert [asked[f"segment_{n}"] for n in range(2, 6)] == [
        "It is red.",
        "It stands there.",
        "It is old!",
        "Is it? Yes.",
    ]
    assert server.keys == {"secret-key"}
    assert not any(b"secret-key" in file.read_bytes() for file in runs.rglob("*") if file.is_file())


def test_a_rerun_sends_nothing_and_writes_the_same_scores(judge, server):
    first = judge()
    again = judge()
    assert sum(server.asked.values()) == 30
    for before, after in zip(scores_of(first), scores_of(again)):
        assert before | {"finished_at": None} == after | {"finished_at": None}


def test_another_prompt_is_another_judge(judge, server, tmp_path):
    (tmp_path / "other.md").write_text("Score it.")
    for settings in ({}, {"prompt_file": tmp_path / "other.md"}):
        results = judge(**settings)
    assert len({judged["judge"] for judged in scores_of(results)}) == 2


def test_a_dry_run_counts_and_estimates_and_sends_nothing(judge, server, capsys):
    results = judge("--dry_run")
    printed = capsys.readouterr().out
    assert "40 answers in 2 runs, 30 distinct ones" in printed and "30 are to be made" in printed
    estimate = float(printed.split("estimated cost ")[1].split()[0])
    letters = len(PROMPT.read_text())
    assert estimate == pytest.approx(30 * ((letters + 300) / 4 + 4 * 260) / 1e6, rel=0.1)
    assert not server.asked and not scores_of(results)


def test_an_empty_answer_is_scored_without_a_call_and_a_long_one_is_cut_and_both_are_counted(runs, judge, server):
    odd = make_answers(4)
    odd[0]["answer"], odd[1]["answer"], odd[2]["answer"] = "", " \n", "word " * 5000
    make_run(runs, Entry("odd", "c", view="semantic"), TASK, odd)
    results = judge("--only", "odd")
    (judged,) = scores_of(results)
    assert (judged["empty"], judged["cut"], judged["max_words"]) == (2, 1, MAX_WORDS) and len(server.asked) == 2
    verdicts = {sample["id"]: sample["verdict"] for sample in judged["samples"]}
    assert verdicts[0] == verdicts[1] == empty_verdict() and judged["metrics"]["gptscore"]["n"] == 4
    longest = max(server.asked, key=len)
    assert longest.count("word") == MAX_WORDS
    assert judged["metrics"]["gptscore_2"]["n"] == 1, "a segment without a sentence has no score"


def test_an_answer_without_reference_is_counted_and_the_others_are_scored(runs, judge):
    odd = make_answers(4)
    odd[1]["references"], odd[2]["references"] = [], ["", None]
    make_run(runs, Entry("odd", "c", view="semantic"), TASK, odd)
    (judged,) = scores_of(judge("--only", "odd"))
    assert judged["unscored"] == {"the sample has no reference": 2} and judged["metrics"]["gptscore"]["n"] == 2


def test_faults_of_all_kinds_cost_no_score_and_no_answer_is_paid_for_twice(judge, server, monkeypatch):
    server.fault_share = 0.4
    monkeypatch.setattr(journal, "TIMEOUT", 0.5)
    results = judge(concurrency=4)
    for judged in scores_of(results):
        assert judged["waiting"] == 0 and len(judged["samples"]) + sum(judged["unscored"].values()) == 20
    assert all(count <= 1 for count in server.answered.values())
    before = sum(server.asked.values())
    server.fault_share = 0
    judge()
    assert sum(server.asked.values()) == before


def test_a_case_without_usable_reply_is_quarantined_with_the_reason_and_asked_again_on_request(judge, server, runs):
    judge("--dry_run")
    text = json.dumps({
        "question": "What is this?", "reference": "A thing number 3.",
        "segment_1": "It is thing 3.", "segment_2": "It is red.", "segment_3": "It stands there.",
        "segment_4": "It is old!", "segment_5": "Is it? Yes.",
    })  # fmt: skip
    server.always[text] = "schema"
    results = judge()
    (line,) = (runs / "judge" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == 3 and "" in json.loads(line)["reason"]
    assert [sum(judged["unscored"].values()) for judged in scores_of(results)] == [1, 1]
    del server.always[text]
    assert all(not judged["unscored"] for judged in scores_of(judge("--retry_quarantined")))


def test_the_cap_on_the_cost_holds_and_a_rerun_with_a_higher_one_continues(judge, server, runs):
    prices = OPTIONS["prices"]
    with pytest.raises(SystemExit, match="higher --max_cost to go on"):
        judge(max_cost=0.03)
    assert 0 < server.cost(prices) <= 0.03
    judged = scores_of(read_results(runs))
    assert sum(len(one["samples"]) for one in judged) > 0 and sum(one["waiting"] for one in judged) > 0
    table = {"name": "t", "title": "T", "columns": [{"title": "GPTscore", "tasks": [TASK], "figure": "gptscore"}]}
    text = write(runs, Matrix([Entry("one", "a")], [TASK], [table]))["t.md"]
    assert "not judged yet" in text
    judge()
    assert max(server.asked.values()) == 1 and server.cost(prices) == pytest.approx(30 * call_cost(prices))


def call_cost(prices):
    return (INPUT_TOKENS * prices[0] + OUTPUT_TOKENS * prices[1]) / 1e6


def test_if_the_endpoint_is_down_the_message_says_so_and_scores_are_kept(judge, server, runs):
    judge("--only", "one")
    server.fault_share, server.faults = 1.0, ("500",)
    with pytest.raises(
        SystemExit, match="gave no usable reply for the last .*run the same command again when it is back"
    ):
        judge(concurrency=1)
    judged = {result["entry"]["name"]: scores_of([result])[0] for result in read_results(runs)}
    assert judged["one"]["waiting"] == 0 and judged["two"]["waiting"] == 10 and len(judged["two"]["samples"]) == 10


def test_an_address_without_a_server_ends_with_a_message(judge):
    with pytest.raises(SystemExit, match="gave no usable reply"):
        judge(base_url="http://127.0.0.1:9/v1", concurrency=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_can_be_continued(judge, server, number, interruptible):
    server.hold = 0.01
    server.arrived = lambda count: os.kill(os.getpid(), number) if count == 8 else None
    with pytest.raises(SystemExit, match="stopped; run the same command to continue"):
        judge(concurrency=2)
    results = judge()
    assert all(judged["waiting"] == 0 for judged in scores_of(results))
    assert sum(count > 1 for count in server.answered.values()) <= 2


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_rerun_repeats_no_paid_call(server, tmp_path, kills):
    server.fault_share, server.faults = 0.2, ("429", "500", "half", "schema")
    runs = tmp_path / "results"
    make_run(runs, Entry("many", "a"), TASK, make_answers(200))
    command = [sys.executable, "-m", "granulon.evaluation.judge.run", *line(runs, server, concurrency=4)]
    draws = random.Random(kills)
    for _ in range(kills):
        sent = sum(server.asked.values())
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while sum(server.asked.values()) < sent + draws.randint(10, 40) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    main(line(runs, server, concurrency=4))
    (judged,) = scores_of(read_results(runs))
    assert len(judged["samples"]) + sum(judged["unscored"].values()) == 200
    entries = (runs / "judge" / "calls.jsonl").read_text().splitlines()
    answered = [key for entry in entries for key in json.loads(entry).get("answers", ())]
    assert len(answered) == len(set(answered)) == len(judged["samples"])
    twice = [text for text, count in server.answered.items() if count > 1]
    assert len(twice) <= 4 * kills, "only calls under way when the process died are made again"


def test_the_judge_sees_the_image_of_the_question(tmp_path, server, monkeypatch):
    from granulon.evaluation import lmms_model
    from granulon.evaluation.run import main as evaluate
    from granulon.hub.assemble import assemble_tiny

    monkeypatch.setattr(images, "IMAGE_SIDE", 32)
    monkeypatch.setattr(run, "IMAGE_TOKENS", 500)
    monkeypatch.setattr(lmms_model, "_cut", lambda text, until: f"A picture. It has {len(text)} letters.")
    task, model = "granulon_aokvqa_direct", str(assemble_tiny(tmp_path / "tiny"))
    settings = ["--sample_rows", "--limit", "3"]
    evaluate(["--model", model, "--tasks", task, "--output", str(tmp_path / "results"), *settings])
    main(line(tmp_path / "results", server, sees="image", tasks=task))
    (judged,) = scores_of(read_results(tmp_path / "results"))
    assert len(judged["samples"]) == 3 and judged["sees"] == "image" and len(server.images) == 3
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in server.images]
    assert {picture.size for picture in pictures} == {(32, 32)} and len(set(server.images)) == 3
    assert "reference" not in json.loads(next(iter(server.asked)))
    main(line(tmp_path / "results", server, sees="image", tasks=task))
    assert sum(server.asked.values()) == 3
    most = [json.loads(entry)["cost"] for entry in (tmp_path / "results/judge/calls.jsonl").read_text().splitlines()]
    assert max(most) < 0.015, "the cost of an image is bounded by its tokens, not by the bytes of its file"


def test_scores_of_two_judges_do_not_mix_in_a_table(runs, judge, server, tmp_path):
    judge()
    server.shift = 40
    (tmp_path / "newer.md").write_text("Score it.")
    judge("--only", "one", prompt_file=tmp_path / "newer.md")
    entries = [Entry("one", "a"), Entry("two", "b", view="pixel")]
    columns = [
        {"title": "GPTscore", "tasks": [TASK], "figure": "gptscore"},
        {"title": "H", "tasks": [TASK], "figure": "gpt_hallucination"},
    ]
    matrix = Matrix(entries, [TASK], [{"name": "t", "title": "T", "columns": columns, "compare": "one"}])
    written = write(runs, matrix)
    both, one = sorted((set(result["judges"]) for result in read_results(runs)), key=len, reverse=True)
    (older,), (newer,) = one, both - one
    assert f"Judged by `{older}`; the paper's judge was GPT-4o." in written["t.md"]
    assert "not judged" not in written["t.md"]
    (test, other) = json.loads(written["t.json"])["tests"]
    assert test["figure"] == "gptscore" and test["samples"] == 20 and other["test"] == "swaps"
    judge("--only", "two", prompt_file=tmp_path / "newer.md")
    assert f"Judged by `{newer}`" in write(runs, matrix)["t.md"], "of two judges with as many runs, the newer"


def test_segments_are_the_authors():
    def authors(text, number=5):
        sentences = re.split(r"(?<=[.!?。！？])\s*", text.strip())
        size, found = max(1, len(sentences) // number), []
        for place in range(number):
            end = (place + 1) * size if place < number - 1 else len(sentences)
            found.append(" ".join(sentences[place * size : end]).strip())
        return found

    for count in range(1, 23):
        text = " ".join(f"Sentence {number} here" for number in range(count)).replace(" S", ". S")
        assert segments(text) == authors(text), count
    assert segments("One. Two!") == ["One.", "Two!", "", "", ""] and segments("") == [""] * 5


def test_a_text_is_cut_between_words_and_an_empty_segment_has_no_score():
    assert cut_words(" one  two\nthree ", 3) == ("one  two\nthree", False)
    assert cut_words("one  two\nthree four", 2) == ("one  two", True)
    found = statistics_of(empty_verdict(), ["One.", "", "", "", ""])
    assert set(found) == {*JUDGED, *(f"{name}_1" for name in JUDGED)}


@pytest.mark.parametrize("score", ["-1", "101", "50.5", '"high"', "null"])
def test_invalid_scores_do_not_fit_the_schema(score):
    reply = json.dumps(empty_verdict())
    Verdict.model_validate_json(reply)
    with pytest.raises(ValidationError):
        Verdict.model_validate_json(reply.replace('"accuracy": 0', f'"accuracy": {score}', 1))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model": None}, "no model is given"),
        ({"prices": None}, "--prices has 0 numbers, expected two"),
        ({"prices": ("nan", 1)}, "expected 0 or more"),
        ({"max_cost": "nan"}, "expected 0 or more"),
        ({"concurrency": 0}, "--concurrency is 0 .*expected 1 or more"),
        ({"tasks": "pope"}, "has no finished run of the tasks pope; it has granulon_cc12m"),
        ({"only": "nobody"}, "no finished run of .'nobody'.; it has"),
        ({"results": "/nowhere"}, "run granulon-evaluate --output /nowhere first"),
        ({"prompt_file": "absent.md"}, "absent.md"),
    ],
)
def test_invalid_options_are_refused_with_a_message(judge, server, settings, message):
    with pytest.raises(SystemExit, match=message):
        judge(**settings)
    assert not server.asked
