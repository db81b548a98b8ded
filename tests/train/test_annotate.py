"""`granulon-annotate`: every row is labelled or quarantined, no call is paid twice, and a corpus is written."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import fields

import datasets
import numpy as np
import pytest
from conftest import make_image, make_model, make_processor
from fault_server import INPUT_TOKENS, LABEL_FAULTS, OUTPUT_TOKENS, FaultServer
from huggingface_hub import DatasetCard
from pydantic import ValidationError
from sklearn.metrics import cohen_kappa_score

from granulon.train.controller import annotate as module
from granulon.train.controller import corpus, journal
from granulon.train.controller.annotate import AnnotateArguments, agreement, label_schema, main
from granulon.train.controller.corpus import check_rows, read_corpus
from granulon.train.controller.journal import Journal

LEVELS = ["coarse", "medium", "fine"]
PRICES = ["1", "4"]
FEW = {"questions_per_call": 2, "max_tokens": 800}  # so that a cap of 0.02 USD ends a run of 54 questions


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_rows(count=60):
    """Three questions about each image; every tenth question was asked before."""
    return [
        {"question": f"What is {number - (number % 10 == 9)}?", "image": f"{number // 3}.png", "other": number}
        for number in range(count)
    ]


@pytest.fixture
def server():
    with FaultServer() as server:
        yield server


@pytest.fixture
def command(tmp_path, monkeypatch, server):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    write_rows(tmp_path / "questions.jsonl", make_rows())

    def run(*more, twice=0.05, **settings):
        monkeypatch.setattr(module, "REPEATED_SHARE", twice)
        monkeypatch.setattr(journal, "FIRST_WAIT", 0.0)
        values = {
            "--data": tmp_path / "questions.jsonl", "--output": tmp_path / "corpus", "--model": "m",
            "--base_url": server.base_url, "--max_cost": 5.0, "--prices": PRICES,
        }  # fmt: skip
        values |= {f"--{name}": value for name, value in settings.items()}
        given = {
            name: value if isinstance(value, list) else [value] for name, value in values.items() if value is not None
        }
        flat = [str(part) for name, value in given.items() for part in (name, *value)]
        monkeypatch.setattr(sys, "argv", ["granulon-annotate", *flat, *more])
        main()
        return tmp_path / "corpus"

    return run


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_every_row_is_labelled_and_every_distinct_question_is_asked_once(command, server):
    folder = command(twice=0)
    report, rows = report_of(folder), read_corpus(folder)
    assert report["rows"] == report["labelled_rows"] == sum(row["rows"] for row in rows) == 60
    assert len(rows) == report["questions"] == len(server.asked) == 54 and max(server.asked.values()) == 1
    assert sorted(server.calls) == [14, 20, 20]
    for row in check_rows(rows, LEVELS):
        expected = server.answer(row["question"])["probabilities"]
        assert row["level_probs"] == pytest.approx(expected) and row["level"] == max(expected, key=expected.get)
        assert row["annotator"] == {"model": "m", "prompt_sha": report["prompt_sha"]}
        assert row["source"] == "annotated" and row["created_at"] and row["reason"] == "small"
    used = [sum(row["usage"][name] for row in rows) for name in ("input_tokens", "output_tokens")]
    assert used == pytest.approx([3 * INPUT_TOKENS, 3 * OUTPUT_TOKENS]), "a row has its share of the call's tokens"
    assert report["spent_usd"] == pytest.approx(3 * (INPUT_TOKENS + 4 * OUTPUT_TOKENS) / 1e6)


@pytest.mark.parametrize("fault", LABEL_FAULTS)
def test_a_label_that_is_missing_or_invalid_or_there_twice_concerns_its_question_alone(command, server, fault):
    server.always["What is 7?"] = fault
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "SCHEMA_ATTEMPTS", 2)
        folder = command(twice=0)
    assert sorted(server.calls) == [1, 1, 14, 20, 20], "asked again alone, and not for ever"
    assert server.asked.pop("What is 7?") == 3 and set(server.asked.values()) == {1}
    report, rows = report_of(folder), read_corpus(folder)
    assert len(rows) == 53 and report["quarantined_rows"] == 1 and report["labelled_rows"] == 59
    assert all(row["level_probs"] == pytest.approx(server.answer(row["question"])["probabilities"]) for row in rows)


def test_random_faults_of_labels_lose_and_swap_none(command, server):
    server.label_fault_share = 0.3
    folder = command(twice=0)
    rows = read_corpus(folder)
    assert report_of(folder)["labelled_rows"] == 60 and 1 < server.calls.count(1) < 40
    assert all(row["level_probs"] == pytest.approx(server.answer(row["question"])["probabilities"]) for row in rows)


@pytest.mark.parametrize(
    "change",
    [
        lambda labels: labels[::-1],
        lambda labels: [*labels, {**labels[0], "number": 7}, {**labels[0], "number": -1}],
    ],
    ids=["another order", "labels of no question"],
)
def test_labels_belong_to_questions_by_their_number(command, server, change):
    server.change_labels = change
    rows = read_corpus(command(twice=0))
    assert len(rows) == 54 and len(server.calls) == 3
    assert all(row["level_probs"] == pytest.approx(server.answer(row["question"])["probabilities"]) for row in rows)


def test_an_annotator_that_counts_instead_of_copying_the_numbers_labels_nothing(command, server, tmp_path):
    """If it left out a question and counted on, each label would belong to the question before."""
    server.change_labels = lambda labels: [{**label, "number": n} for n, label in enumerate(labels[1:] or labels, 1)]
    with pytest.raises(SystemExit, match="0 of 1 labels have the number of the question"):
        command(twice=0, concurrency=2)
    assert not report_of(tmp_path / "corpus")["labelled_rows"]


def test_of_a_call_that_the_endpoint_refuses_each_question_is_asked_alone(command, server):
    server.always["What is 50?"] = "400"
    report = report_of(command(twice=0, concurrency=1))
    assert report["labelled_rows"] == 59 and report["quarantined_rows"] == 1
    assert server.asked["What is 50?"] == 2


def test_a_question_without_label_in_every_call_does_not_stop_the_run(command, server, monkeypatch):
    monkeypatch.setattr(journal, "SCHEMA_ATTEMPTS", 1)
    distinct = list(dict.fromkeys(row["question"] for row in make_rows()))
    server.always = dict.fromkeys(distinct[::2], "unknown level")
    report = report_of(command(twice=0, questions_per_call=4, concurrency=1))
    assert report["questions"] == len(distinct[1::2]) and not report["unanswered_rows"]


def test_another_number_of_questions_per_call_repeats_none(command, server):
    command(twice=0, limit=20, questions_per_call=7)
    report = report_of(command(twice=0, questions_per_call=3))
    assert report["questions"] == 54 and max(server.asked.values()) == 1 and max(server.calls) == 7


def test_a_limit_labels_so_many_questions_and_a_larger_one_goes_on_from_there(command, server):
    folder = command(twice=0, limit=10)
    few, report = {row["question"] for row in read_corpus(folder)}, report_of(folder)
    assert len(few) == 10 and report["unchosen_rows"] == 60 - report["labelled_rows"] > 0
    more = {row["question"] for row in read_corpus(command(twice=0, limit=30))}
    assert few < more and len(more) == 30 and sum(server.asked.values()) == 30


def test_twenty_thousand_questions_cost_less_than_three_dollars_with_the_default_model(command, capsys, tmp_path):
    rows = [
        {"question": f"What does the person number {n} beside the table hold in the left hand?"} for n in range(25_000)
    ]
    path = write_rows(tmp_path / "many.jsonl", rows)
    command("--dry_run", data=path, limit=20_000, model=None, prices=None, base_url=None)
    printed = capsys.readouterr().out
    assert "25000 distinct questions: 20000 to label" in printed
    assert 0.3 < float(printed.split("estimated cost ")[1].split()[0]) < 3


def test_the_annotator_gets_the_prompt_and_a_strict_schema_and_never_writes_the_key_down(command, server):
    folder = command()
    body = server.bodies[-1]
    assert body["messages"][0]["content"] == module.PROMPT.read_text()
    schema = body["response_format"]["json_schema"]
    assert schema["strict"] and schema["schema"]["additionalProperties"] is False
    assert schema["schema"]["$defs"]["Label"]["required"] == ["number", "reason", "probabilities"]
    shares = schema["schema"]["$defs"]["Probabilities"]
    assert shares["required"] == LEVELS and shares["additionalProperties"] is False
    assert server.keys == {"secret-key"}
    assert not any(b"secret-key" in file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_the_same_command_again_sends_nothing_and_leaves_the_same_corpus(command, server):
    folder = command()
    before, sent = (
        {file.name: file.read_bytes() for file in folder.glob("*") if file.is_file()},
        sum(server.asked.values()),
    )
    command()
    assert sum(server.asked.values()) == sent
    assert {file.name: file.read_bytes() for file in folder.glob("*") if file.is_file()} == before


def test_rows_of_one_image_are_in_one_split(command):
    folder = command(twice=0)
    place = {row["question"]: row["split"] for row in read_corpus(folder)}
    splits = {}
    for row in make_rows():
        if row["other"] % 10 not in (8, 9):  # those questions stand in two rows
            splits.setdefault(row["image"], set()).add(place[row["question"]])
    assert len(set.union(*splits.values())) == 3
    assert all(len(found) == 1 for found in splits.values())


def test_a_share_is_asked_twice_and_the_agreement_is_reported(command, server, capsys):
    folder = command(twice=1.0)
    assert set(server.asked.values()) == {2}
    again = report_of(folder)["agreement"]
    assert again["pairs"] == 54 and again["equal"][0] == again["kappa"][0] == 1.0
    assert "Cohen's kappa 1.000 [1.000, 1.000]" in (folder / "README.md").read_text()


def test_kappa_is_that_of_scikit_learn_and_lies_in_its_interval():
    draws = np.random.default_rng(0)
    first = draws.integers(3, size=300)
    second = np.where(draws.random(300) < 0.7, first, draws.integers(3, size=300))
    pairs = [(LEVELS[a], LEVELS[b]) for a, b in zip(first, second, strict=True)]
    found = agreement(pairs, LEVELS)
    value, low, high = found["kappa"]
    assert value == pytest.approx(cohen_kappa_score(first, second))
    assert low < value < high and 0.1 < high - low < 0.3
    assert found["equal"][0] == pytest.approx((first == second).mean())
    assert agreement([], LEVELS) is None
    assert agreement([("fine", "fine")], LEVELS)["kappa"][0] == 1


def test_a_dry_run_counts_and_estimates_and_sends_nothing(command, server, capsys, tmp_path):
    command("--dry_run")
    printed = capsys.readouterr().out
    assert "60 rows, 54 distinct questions: 54 to label" in printed and "0 are done, " in printed
    questions, calls = (int(printed.split(words)[1].split()[0]) for words in ("are done, ", "to be asked in "))
    assert questions >= 54 and calls == 3 + (questions > 54)
    tokens_in = int(printed.split("USD (")[1].split()[0])
    letters = calls * len(module.PROMPT.read_text()) + questions * len('{"number": 123, "question": "What is 12?"}, ')
    assert letters / 4 < tokens_in < letters / 4 + 300 * calls, "prompt and schema once a call"
    estimate = float(printed.split("estimated cost ")[1].split()[0])
    assert estimate == pytest.approx((tokens_in + 4 * 60 * questions) / 1e6, abs=1e-4)
    assert not server.asked and not (tmp_path / "corpus" / "train.jsonl").exists()


def test_rows_without_a_usable_question_or_reply_are_reported_and_none_is_lost(command, server, tmp_path):
    rows = [*make_rows(6), {"question": ""}, {"question": None}, {"other": 1}, {"question": 7}]
    path = write_rows(tmp_path / "odd.jsonl", rows)
    path.write_text(path.read_text() + "no json\n\n")
    server.always["What is 3?"] = "unknown level"
    folder = command(data=path, twice=0)
    report = report_of(folder)
    assert report["rows"] == 11 == report["labelled_rows"] + report["quarantined_rows"]
    quarantined = [json.loads(line) for line in (folder / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["reason"][:20] for entry in quarantined[:5]] == [
        f"row {n} has no question"[:20] for n in range(6, 11)
    ]
    assert quarantined[5]["question"] == "What is 3?" and "did not fit the schema" in quarantined[5]["reason"]
    asked = server.asked["What is 3?"]
    command(data=path, twice=0)
    assert server.asked["What is 3?"] == asked
    del server.always["What is 3?"]
    command("--retry_quarantined", data=path, twice=0)
    assert report_of(folder)["labelled_rows"] == 6


def test_above_the_cap_the_labelled_rows_are_kept_and_the_message_says_how_to_go_on(command, server, tmp_path):
    with pytest.raises(SystemExit, match="higher --max_cost to go on"):
        command(max_cost=0.02, twice=0, **FEW)
    report = report_of(tmp_path / "corpus")
    assert 0 < report["labelled_rows"] < 60 and report["unanswered_rows"] == 60 - report["labelled_rows"]
    assert report["spent_usd"] <= 0.02
    command(max_cost=1, twice=0, **FEW)
    assert report_of(tmp_path / "corpus")["labelled_rows"] == 60 and max(server.asked.values()) == 1


def test_a_wrong_key_stops_at_once_with_what_to_check(command, server, tmp_path):
    server.fault_share, server.faults = 1.0, ("401",)
    with pytest.raises(SystemExit, match="OPENAI_API_KEY") as stop:
        command(concurrency=2, questions_per_call=1)
    assert len(server.calls) <= 4
    assert "secret-key" not in str(stop.value), "the endpoint's message repeats it"
    assert not any(b"secret-key" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_how_to_go_on_and_a_rerun_repeats_no_journalled_call(
    command, server, tmp_path, number, interruptible
):
    server.hold = 0.01
    server.arrived = lambda count: os.kill(os.getpid(), number) if count == 10 else None
    before = signal.getsignal(number)
    with pytest.raises(SystemExit, match="stopped; the same command continues from here"):
        command(twice=0, concurrency=4, questions_per_call=2)
    assert signal.getsignal(number) == before
    with Journal(tmp_path / "corpus" / "run" / "calls.jsonl") as journal:
        assert 10 <= len(journal.answers) < 30
        answered, asked = len(journal.answers), sum(server.asked.values())
    folder = command(twice=0)
    assert report_of(folder)["labelled_rows"] == 60
    assert sum(server.asked.values()) == asked + 54 - answered


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_rerun_repeats_no_journalled_call(server, tmp_path, kills):
    server.fault_share, server.faults = 0.2, ("429", "500", "half", "schema")
    write_rows(tmp_path / "questions.jsonl", make_rows(300))
    code = "from granulon.train.controller import annotate, journal; journal.FIRST_WAIT = annotate.REPEATED_SHARE = 0"
    line = [sys.executable, "-c", f"{code}; annotate.main()"]
    line += ["--data", tmp_path / "questions.jsonl", "--output"]
    line += [
        tmp_path / "corpus",
        "--model",
        "m",
        "--base_url",
        server.base_url,
        "--max_cost",
        "5",
    ]
    line += ["--prices", "1", "4", "--concurrency", "4", "--questions_per_call", "3"]
    moments, calls = random.Random(0), tmp_path / "corpus" / "run" / "calls.jsonl"
    for _ in range(kills):
        sent = sum(server.asked.values())
        process = subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while sum(server.asked.values()) < sent + moments.randint(20, 50) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert report_of(tmp_path / "corpus")["labelled_rows"] == 300
    answered = [key for entry in calls.read_text().splitlines() for key in json.loads(entry).get("answers", ())]
    assert len(answered) == len(set(answered)) == 270
    again = {question: count for question, count in server.answered.items() if count > 1}
    assert len(again) <= kills * 4 * 3, "only calls under way when the process died are made again"


def test_the_card_loads_with_datasets_and_says_where_the_labels_come_from(command):
    folder = command()
    card = DatasetCard.load(folder / "README.md")
    assert card.data.configs[0]["data_files"][0]["split"] == "test"
    assert "`m`" in card.text and "Llama" in card.text and "54 of 60 rows" in card.text
    loaded = datasets.load_dataset(str(folder))
    assert sum(split.num_rows for split in loaded.values()) == 54
    assert (folder / "labelling_prompt.md").read_text() == module.PROMPT.read_text()


def test_the_upload_holds_the_corpus_and_nothing_of_the_run(command, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo_id, **kwargs):
            calls.append((repo_id, kwargs))

        def upload_folder(self, **kwargs):
            calls.append(kwargs)
            return "https://hub/datasets/me/corpus"

    monkeypatch.setattr(corpus, "HfApi", Api)
    folder = command(push_to_hub="me/corpus")
    (repo, kwargs), upload = calls
    assert repo == "me/corpus" and kwargs == {"repo_type": "dataset", "private": True, "exist_ok": True}
    from huggingface_hub.utils import filter_repo_objects

    names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    uploaded = set(
        filter_repo_objects(names, allow_patterns=upload["allow_patterns"], ignore_patterns=upload["ignore_patterns"])
    )
    assert uploaded == {
        "train.jsonl",
        "validation.jsonl",
        "test.jsonl",
        "report.json",
        "README.md",
        "labelling_prompt.md",
    }
    assert "run/calls.jsonl" in names


def test_an_incomplete_corpus_is_not_uploaded(command, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "HfApi", lambda: pytest.fail("the upload began"))
    with pytest.raises(SystemExit, match="higher --max_cost"):
        command(max_cost=0.02, twice=0, push_to_hub="me/corpus", **FEW)
    assert "not uploaded to me/corpus: some rows have no reply yet" in capsys.readouterr().out


@pytest.mark.parametrize("share", ["NaN", "Infinity", "-0.5", "1.5"])
def test_invalid_probabilities_do_not_fit_the_schema(share):
    reply = '{"number": 123, "reason": "r", "probabilities": {"coarse": %s, "medium": 0.5, "fine": 0.0}}'
    label_schema(LEVELS).model_validate_json(reply % "0.5")
    with pytest.raises(ValidationError):
        label_schema(LEVELS).model_validate_json(reply % share)


def test_help_lists_every_option(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["granulon-annotate", "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"--{option.name}" in printed and option.metadata["help"] for option in fields(AnnotateArguments))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model": ""}, "no model is given"),
        ({"prices": None}, "--prices has 0 numbers"),
        ({"limit": 0}, "--limit is 0; expected 1 or more"),
        ({"questions_per_call": 0}, "--questions_per_call is 0; expected 1 to 66"),
        (
            {"questions_per_call": 50, "max_tokens": 800},
            "is 50; expected 1 to 13, as a label takes about 60 of the 800",
        ),
        ({"checkpoint": "c", "limit": 5}, "--limit is for questions to annotate"),
        ({"data": '{"columns": {"question": "query"}}'}, "expected 'path'"),
        ({"prompt_file": __file__}, r"defines the levels \[\]; expected two or more"),
        ({"data": "absent.jsonl"}, "there is no file absent.jsonl"),
        ({"concurrency": 0}, "expected 1 or more"),
        ({"max_tokens": 0}, "expected 1 or more"),
        ({"max_cost": "nan"}, "and --max_cost nan; expected 0 or more"),
        ({"prices": ["inf", "1"]}, "expected 0 or more"),
    ],
)
def test_invalid_arguments_are_refused_with_the_remedy(command, server, settings, message):
    with pytest.raises(SystemExit, match=message):
        command(**settings)
    assert not server.asked


@pytest.fixture
def measured(tmp_path, monkeypatch):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    rows = []
    for number in range(12):
        make_image(number).save(tmp_path / f"{number}.png")
        rows.append({"question": f"q{number}?", "answer": "yes" * (1 + number % 3), "image": f"{number}.png"})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setattr(module, "PART_ROWS", 5)

    def run(*more):
        values = ["--checkpoint", tmp_path / "model", "--data", tmp_path / "rows.json"]
        arguments = [*values, "--output", tmp_path / "corpus", *more]
        monkeypatch.setattr(sys, "argv", ["granulon-annotate", *map(str, arguments)])
        main()
        return tmp_path / "corpus"

    return run


def test_measured_labels_make_a_corpus_of_the_same_form(measured):
    folder = measured()
    rows = check_rows(read_corpus(folder), ["coarse", "fine"])
    assert len(rows) == report_of(folder)["questions"] == 12
    assert all(row["source"] == "measured" and set(row["answer_nll"]) == {"coarse", "fine"} for row in rows)
    assert "The labels are measured" in (folder / "README.md").read_text()
    assert not list(folder.rglob("measured-*"))


def test_an_interrupted_measurement_resumes(measured, monkeypatch, tmp_path):
    measure, done = module.measure_rows, []

    def counted(model, processor, rows, **settings):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(rows))
        return measure(model, processor, rows, **settings)

    monkeypatch.setattr(module, "measure_rows", counted)
    with pytest.raises(SystemExit, match="the same command continues"):
        measured()
    assert done == [5, 5]
    done.append(None)
    measured()
    assert done[3:] == [2]
    assert len(read_corpus(tmp_path / "corpus")) == 12


def test_measurements_of_other_rows_or_weights_are_not_reused(measured, monkeypatch, tmp_path):
    measure, done = module.measure_rows, []

    def counted(model, processor, rows, **settings):
        if len(done) in (1, 3):
            done.append("cut off")
            raise KeyboardInterrupt
        done.append(len(rows))
        return measure(model, processor, rows, **settings)

    monkeypatch.setattr(module, "measure_rows", counted)
    with pytest.raises(SystemExit):
        measured()
    rows = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps(rows[::-1]))
    with pytest.raises(SystemExit):
        measured()
    make_model(seed=1, tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    measured()
    assert done == [5, "cut off", 5, "cut off", 5, 5, 2]
    assert len(read_corpus(tmp_path / "corpus")) == 12
