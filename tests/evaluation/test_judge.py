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
from dataclasses import replace

import numpy as np
import pytest
from fault_server import INPUT_TOKENS, OUTPUT_TOKENS, FaultServer
from PIL import Image
from pydantic import ValidationError
from test_tables import make_run, write

from granulon.evaluation.judge import images, run
from granulon.evaluation.judge.protocols import PROTOCOLS
from granulon.evaluation.judge.reply import EMPTY_VERDICT, SegmentVerdict, Verdict, cut_words, segments
from granulon.evaluation.judge.run import MAX_WORDS, main
from granulon.evaluation.matrix import Entry, Matrix, Settings, read_results
from granulon.evaluation.metrics import JUDGED, JUDGED_SEGMENTS
from granulon.evaluation.protocols import AUTHORS, OURS
from granulon.evaluation.scoring import figures
from granulon.train.controller import journal

TASK = "granulon_cc12m"
PROMPT = PROTOCOLS[OURS].prompt
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
            content = next(part["text"] for part in content if part["type"] == "text")
        body["messages"][-1]["content"] = json.dumps(content)
        text = json.dumps(body).encode()
        again = asyncio.StreamReader()
        again.feed_data(re.sub(rb"(?i)(content-length: *)\d+", rb"\g<1>%d" % len(text), head) + text)
        again.feed_eof()
        return await super()._exchange(again, writer)

    def answer(self, question):
        if not question.startswith("{"):
            parts = re.findall(r"Segment \d: (.*)", question)
            named = {f"segment_{number}": self.scores(part) for number, part in enumerate(parts, 1)}
            return {
                f"{score}_scores": {name: own[score] for name, own in named.items()}
                for score in ("accuracy", "hallucination")
            }
        return {"reason": f"`{self.shift}` apart", **self.scores(question)}

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


def test_every_answer_is_scored_and_equal_answers_share_a_call(judge, server):
    results = judge()
    assert len(server.asked) == 30 and set(server.asked.values()) == {1}
    for judged in scores_of(results):
        assert judged["waiting"] == 0 and len(judged["samples"]) == 20 and judged["model"] == "m"
        assert len(judged["prompt_sha"]) == 64 and judged["judge"].startswith(f"judge-m-{judged['prompt_sha'][:12]}")
        assert set(judged["metrics"]) == set(JUDGED)
        whole = judged["metrics"]["gptscore"]
        scores = [sample["verdict"]["accuracy"] for sample in judged["samples"]]
        assert whole["value"] == pytest.approx(np.mean(scores)) and whole["low"] < whole["value"] < whole["high"]
        assert whole["n"] == 20 and not judged["metrics"]["gpt_hallucination"]["higher_is_better"]


def test_a_call_has_the_prompt_a_strict_schema_and_the_answer_and_the_key_is_never_written(judge, server, runs):
    judge()
    body = server.bodies[-1]
    assert body["messages"][0]["content"] == PROMPT.read_text()
    schema = body["response_format"]["json_schema"]
    assert schema["strict"] and schema["schema"]["additionalProperties"] is False
    assert list(schema["schema"]["properties"]) == ["reason", "accuracy", "hallucination", "granularity"]
    asked = json.loads(json.loads(body["messages"][1]["content"]))
    assert list(asked) == ["question", "reference", "answer"]
    assert asked["answer"].endswith("It is red. It stands there. It is old! Is it? Yes.")
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
    assert estimate == pytest.approx(30 * ((letters + 160) / 4 + 4 * 60) / 1e6, rel=0.1)
    assert not server.asked and not scores_of(results)


def test_an_empty_answer_is_scored_without_a_call_and_a_long_one_is_cut_and_both_are_counted(runs, judge, server):
    odd = make_answers(4)
    odd[0]["answer"], odd[1]["answer"], odd[2]["answer"] = "", " \n", "word " * 5000
    make_run(runs, Entry("odd", "c", view="semantic"), TASK, odd)
    results = judge("--only", "odd")
    (judged,) = scores_of(results)
    assert (judged["empty"], judged["cut"], judged["max_words"]) == (2, 1, MAX_WORDS) and len(server.asked) == 2
    verdicts = {sample["id"]: sample["verdict"] for sample in judged["samples"]}
    assert verdicts[0] == verdicts[1] == EMPTY_VERDICT and judged["metrics"]["gptscore"]["n"] == 4
    assert judged["samples"][0]["statistics"]["gptscore"] == [0, 1], "empty answers count, with 0"
    longest = max(server.asked, key=len)
    assert longest.count("word") == MAX_WORDS


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
    case = make_answers(4)[3]
    asked = {"question": case["question"], "reference": case["references"][0], "answer": case["answer"]}
    text = json.dumps(asked)
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
        judge(max_cost=0.02)
    assert 0 < server.cost(prices) <= 0.02
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


@pytest.mark.parametrize("protocol", [OURS, AUTHORS])
def test_the_judge_sees_the_image_of_the_question(tmp_path, server, monkeypatch, protocol):
    from granulon.evaluation import lmms_model
    from granulon.evaluation.run import main as evaluate
    from granulon.hub.assemble import assemble_tiny

    monkeypatch.setitem(PROTOCOLS, protocol, replace(PROTOCOLS[protocol], image_side=32))
    monkeypatch.setattr(run, "IMAGE_TOKENS", 500)
    monkeypatch.setattr(lmms_model, "_cut", lambda text, until: f"A picture. It has {len(text)} letters.")
    task, model = "granulon_aokvqa_direct", str(assemble_tiny(tmp_path / "tiny"))
    settings = ["--sample_rows", "--limit", "3", "--protocol", protocol]
    evaluate(["--model", model, "--tasks", task, "--output", str(tmp_path / "results"), *settings])
    main(line(tmp_path / "results", server, sees="image", tasks=task, protocol=protocol))
    (judged,) = scores_of(read_results(tmp_path / "results"))
    assert len(judged["samples"]) == 3 and judged["sees"] == "image" and len(server.images) == 3
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in server.images]
    assert {picture.size for picture in pictures} == {(32, 32)} and len(set(server.images)) == 3
    assert all('"reference"' not in text for text in server.asked)
    main(line(tmp_path / "results", server, sees="image", tasks=task, protocol=protocol))
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


def authors_segments(text):
    """From the description: cut after each full stop, question or exclamation mark, whatever follows; a fifth of the
    pieces (rounded down, at least one) to each of the first four segments and the rest to the last."""
    pieces, last = [], 0
    text = text.strip()
    for place, character in enumerate(text):
        if character in ".!?。！？":
            pieces.append(text[last : place + 1])
            last = place + 1
            while last < len(text) and text[last].isspace():
                last += 1
    pieces.append(text[last:])  # empty, and counted, after a final full stop
    each = len(pieces) // 5 or 1
    own = [pieces[: each * 1], pieces[each : each * 2], pieces[each * 2 : each * 3], pieces[each * 3 : each * 4]]
    return [" ".join(part).strip() or "(empty)" for part in (*own, pieces[each * 4 :])]


@pytest.mark.parametrize("end", ["", ".", "!  "])
def test_segments_are_the_authors(end):
    for count in range(1, 23):
        text = ". ".join(f"Sentence {number} here" for number in range(count)) + end
        assert segments(text) == authors_segments(text), count
    for text in ("", " ", "It is 3.5 m long...and Mr. X sees it?! Yes", "红色。蓝色！no\n\nline. b", "." * 9):
        assert segments(text) == authors_segments(text), text


def test_worked_examples_of_segments():
    assert segments("One. Two!") == ["One.", "Two!", "(empty)", "(empty)", "(empty)"]
    assert segments("") == ["(empty)"] * 5
    nine = " ".join(f"{number}." for number in range(9))  # ten pieces with the empty one: two to a segment
    assert segments(nine) == ["0. 1.", "2. 3.", "4. 5.", "6. 7.", "8."]


def test_the_authors_gptscore_is_the_mean_over_answers_of_the_mean_over_five_segments():
    scores = [[90, 80, 70, 0, 0], [50, 0, 0, 0, 0], [100] * 5]
    replies = [
        {
            f"{name}_scores": {f"segment_{n}": value for n, value in enumerate(row, 1)}
            for name in ("accuracy", "hallucination")
        }
        for row in scores
    ]
    read = [SegmentVerdict.model_validate(reply).model_dump() for reply in replies]
    found = figures([{"id": n, "statistics": SegmentVerdict.statistics(reply)} for n, reply in enumerate(read)])
    by_segment = [sum(column) / len(scores) for column in zip(*scores)]  # what their script prints
    assert [found[f"gptscore_{n}"]["value"] for n in range(1, 6)] == pytest.approx(by_segment)
    assert found["gptscore"]["value"] == pytest.approx(sum(by_segment) / 5) == pytest.approx(158 / 3)
    assert set(found) == {*JUDGED[:2], *JUDGED_SEGMENTS} and found["gptscore"]["n"] == 3


@pytest.fixture
def authors_runs(runs):
    samples = make_answers(3)
    samples[1]["answer"] = ""
    make_run(runs, Entry("one", "a"), TASK, samples, settings=Settings(protocol=AUTHORS))
    return runs


@pytest.fixture
def judge_authors(authors_runs, judge, monkeypatch):
    class Pictures:
        def __init__(self, result, output, side):
            assert result["settings"]["protocol"] == AUTHORS and side == 2048

        def sha256(self, sample):
            return [str(sample["id"])]

        def data_urls(self, number):
            return [f"data:image/jpeg;base64,{number}"]

    monkeypatch.setattr(images, "Images", Pictures)
    return lambda *more, **settings: judge("--protocol", AUTHORS, *more, **{"sees": None} | settings)


def test_the_authors_judge_gets_segments_then_the_image_in_detail_and_judges_empty_answers(judge_authors, server):
    results = judge_authors()
    (judged,) = scores_of(results)
    assert judged["protocol"] == AUTHORS and judged["empty"] == 0
    assert len(server.asked) == len(judged["samples"]) == 3 and judged["metrics"]["gptscore"]["n"] == 3
    body = server.bodies[0]
    assert body["temperature"] == 0.1 and body["response_format"] == {"type": "json_object"}
    (message,) = body["messages"]
    assert message["role"] == "user"
    sent = next(text for text in server.asked if "(empty)" in text)
    assert sent.startswith(PROTOCOLS[AUTHORS].prompt.read_text())
    assert "Segment 1: (empty)\n\nSegment 2: (empty)" in sent and "What is this?" not in sent
    parts = PROTOCOLS[AUTHORS].messages("p", '{"segment_1": "s"}', [{"type": "image_url"}])[0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url"]
    assert PROTOCOLS[AUTHORS].image_detail == "high"


def test_runs_of_one_protocol_are_judged_by_its_judge_alone(judge, judge_authors, server):
    judge()
    before = sum(server.asked.values())
    judge_authors()
    assert sum(server.asked.values()) == before + 3
    for result in judge("--dry_run"):
        assert {scores["protocol"] for scores in result["judges"].values()} == {result["settings"]["protocol"]}


def test_the_authors_judge_sees_no_reference(judge_authors, server):
    with pytest.raises(SystemExit, match="the judge of the protocol authors sees the image alone; omit --sees"):
        judge_authors(sees="both")
    assert not server.asked


def test_a_thousand_answers_of_180_words_cost_less_than_three_dollars_with_gpt_4o(
    tmp_path, server, monkeypatch, capsys
):
    class Pictures:
        def __init__(self, *_):
            pass

        def sha256(self, sample):
            return [str(sample["id"])]

    monkeypatch.setattr(images, "Images", Pictures)
    answers = make_answers(1000)
    for number, sample in enumerate(answers):
        sample["answer"] = " ".join(["a brown dog sits near the old boat"] * 22 + [str(number)])
    make_run(tmp_path / "results", Entry("one", "a"), TASK, answers)
    main(line(tmp_path / "results", server, "--dry_run", sees=None, prices=(2.5, 10.0)))
    estimate = float(capsys.readouterr().out.split("estimated cost ")[1].split()[0])
    assert 1 < estimate < 3


def test_a_text_is_cut_between_words():
    assert cut_words(" one  two\nthree ", 3) == ("one  two\nthree", False)
    assert cut_words("one  two\nthree four", 2) == ("one  two", True)


@pytest.mark.parametrize("score", ["-1", "101", "50.5", '"high"', "null"])
def test_invalid_scores_do_not_fit_the_schema(score):
    reply = json.dumps(EMPTY_VERDICT)
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
