"""The authors' protocol agrees with their published code, and never mixes with ours."""

import base64
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_metrics import make_bert

from granulon.evaluation import engine, lmms_model
from granulon.evaluation.matrix import read_results, read_samples
from granulon.evaluation.metrics import value
from granulon.evaluation.protocols import AUTHORS, OURS, PROTOCOLS, question_with_options
from granulon.evaluation.run import main
from granulon.evaluation.scoring import text_scores
from granulon.hub.assemble import assemble_tiny

SEED = {
    "question": " What is on the table? ", "choice_a": "a cup", "choice_b": "a dog", "choice_c": "two cups",
    "choice_d": "nothing", "answer": "C", "data_type": "image",
}  # fmt: skip
AOKVQA = {
    "question": "Why stop?", "choices": ["rain", "red light", "fog", "snow"], "correct_choice_idx": 1,
    "direct_answers": "['light', 'rain']",
}  # fmt: skip
TASKS = sorted(PROTOCOLS[AUTHORS].tasks)


def test_the_authors_prompt_lists_the_options_and_asks_for_the_content_of_one():
    expected = "What is on the table?\nOptions:\nA. a cup\nB. a dog\nC. two cups\nD. nothing"
    expected += "\n(Answer with the option content)"
    config = engine.task_config("granulon_seedbench_recall", AUTHORS)
    assert config["doc_to_text"](SEED) == expected
    assert config["doc_to_target"](SEED) == "two cups"
    assert question_with_options("Why?", ["x", "y"]) == "Why?\nOptions:\nA. x\nB. y\n(Answer with the option content)"
    config = engine.task_config("granulon_aokvqa_direct", AUTHORS)
    assert config["doc_to_text"](AOKVQA).startswith("Why stop?\nOptions:\nA. rain\nB. red light\n")
    assert config["doc_to_target"](AOKVQA) == "red light"


def test_the_image_stands_after_the_authors_question():
    """As in theirs: question, options, request, and on a line of its own the image."""
    config = engine.task_config("granulon_seedbench_recall", AUTHORS)
    (message,) = config["doc_to_messages"](SEED | {"image": [Image.new("RGB", (4, 4))]})
    text, image = message["content"]
    assert text["text"] == config["doc_to_text"](SEED) + "\n" and image["type"] == "image"
    assert "doc_to_messages" not in engine.task_config("granulon_seedbench_recall")


def authors_recall(predictions, references):
    """From the description: sets of words in lower case; references without words are left out; the mean of shares."""
    shares = []
    for said, wanted in zip(predictions, references):
        said, wanted = (set(re.sub(r"\W+", " ", text).lower().split()) for text in (said, wanted))
        if wanted:
            shares.append(sum(word in said for word in wanted) / len(wanted))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("task", ["granulon_seedbench_recall", "granulon_aokvqa_direct"])
def test_the_authors_recall_of_a_data_set(task):
    config, doc = (engine.task_config(task, AUTHORS), SEED if "seed" in task else AOKVQA)
    answers = ["C", "Two cups!", "cups cups", "", "The option is: two_cups red-light", "red light. two cups"]
    statistics = [config["process_results"](doc, [answer])["recall"] for answer in answers]
    assert value("recall", statistics) == pytest.approx(
        100 * authors_recall(answers, [config["doc_to_target"](doc)] * len(answers))
    )


def test_the_authors_recall_of_captions_leaves_out_empty_references():
    pairs = [("A dog, a dog.", "The DOG; the cat"), ("it's 3.5 m", "It is 3.5"), ("x", "..."), ("", "a b")]
    found = [text_scores(["recall"], answer, [reference]) for answer, reference in pairs]
    counted = [one["recall"] for one in found if "recall" in one]
    assert len(counted) == 3 and value("recall", counted) == pytest.approx(100 * authors_recall(*zip(*pairs)))


@pytest.mark.parametrize("task", TASKS)
def test_the_authors_answers_are_greedy_and_of_256_tokens_and_39_are_scored(task):
    config = engine.task_config(task, AUTHORS)
    assert config["generation_kwargs"] == {"max_new_tokens": 256, "do_sample": False, "until": []}
    assert engine.own_limit(config) == 39
    assert {entry["metric"] for entry in config["metric_list"]} <= {"recall", "bertscore"}


def test_ours_scores_exact_match_beside_recall_of_short_answers_and_a_thousand_captions():
    for task in ("granulon_seedbench_recall", "granulon_aokvqa_direct", "granulon_surgvlm_phase"):
        config = engine.task_config(task)
        assert {"recall", "exact_match"} <= {entry["metric"] for entry in config["metric_list"]}
        assert engine.own_limit(config) is None
    assert engine.own_limit(engine.task_config("granulon_cc12m")) == 1000


def test_a_task_that_the_authors_do_not_have_is_refused():
    with pytest.raises(ValueError, match="the protocol authors has no task granulon_aokvqa_choice; it has granulon_"):
        engine.task_config("granulon_aokvqa_choice", AUTHORS)


def test_seedbench_starts_at_the_authors_row():
    from datasets import Dataset

    rows = engine.task_config("granulon_seedbench_recall", AUTHORS)["process_docs"](
        Dataset.from_dict({"number": range(600)})
    )
    assert rows["number"][0] == 500 and len(rows) == 100


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 60)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("task", TASKS)
def test_images_of_every_stored_form_are_read(task, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    text = base64.b64encode(png()).decode()
    stored = [Image.open(io.BytesIO(png())), png(), {"bytes": png(), "path": None}, {"bytes": png(), "path": "a.png"}]
    stored += [{"bytes": None, "path": str(tmp_path / "a.png")}, str(tmp_path / "a.png"), text]
    stored += [f"data:image/png;base64,{text}"]
    visual = engine.task_config(task)["doc_to_visual"]
    for form in [*stored, *([form] for form in stored)]:
        (image,) = visual({"image": form})
        assert image.mode == "RGB" and np.asarray(image)[0, 0].tolist() == [200, 30, 60]


@pytest.mark.parametrize("task", [task for task in TASKS if "surgvlm" not in task])
def test_data_sets_have_a_revision_and_their_commit_decides_the_run(task, monkeypatch):
    config = engine.task_config(task)
    assert config["dataset_kwargs"]["revision"] == "main"
    pinned = engine.with_commit(config, "a" * 40)
    assert pinned["dataset_kwargs"] == config["dataset_kwargs"] | {"revision": "a" * 40}
    assert engine.task_identity(task, pinned) != engine.task_identity(task, config)


def test_the_commit_of_a_data_set_is_the_hubs_else_the_caches_else_none(monkeypatch, tmp_path):
    def info(self, path, revision, timeout):
        if path == "some/data":
            return SimpleNamespace(sha=f"commit of {revision}")
        raise OSError("offline")

    monkeypatch.setattr(engine.HfApi, "dataset_info", info)
    monkeypatch.setattr(engine, "HF_HUB_CACHE", tmp_path)
    engine.data_commit.cache_clear()
    (tmp_path / "datasets--cached--data" / "refs").mkdir(parents=True)
    (tmp_path / "datasets--cached--data" / "refs" / "main").write_text("abc123")
    found = [engine.data_commit(path, "main") for path in ("some/data", "cached/data", "no/where", str(tmp_path))]
    engine.data_commit.cache_clear()
    assert found == ["commit of main", "abc123", None, None]
    assert engine.with_commit({"a": 1}, None) == {"a": 1}


def test_all_tasks_of_the_authors_run_offline_apart_from_ours_and_the_tables_show_both(tmp_path, monkeypatch, capsys):
    asked, answer = [], lmms_model.GranulonForEvaluation._answer

    def counted(self, requests):
        asked.extend(request.doc_id for request in requests)
        return answer(self, requests)

    monkeypatch.setattr(lmms_model.GranulonForEvaluation, "_answer", counted)
    options = ["--model", str(assemble_tiny(tmp_path / "tiny")), "--output", str(tmp_path / "results")]
    options += ["--sample_rows", "--bertscore_model", make_bert(tmp_path / "bert")]
    main([*options, "--tasks", *TASKS, "pope", "--protocol", AUTHORS])
    assert "the protocol authors has no pope" in capsys.readouterr().out
    results = read_results(tmp_path / "results")
    assert sorted(result["task"]["name"] for result in results) == TASKS and len(asked) == 8 * len(TASKS)
    for result in results:
        assert result["settings"]["protocol"] == AUTHORS and result["limit"] == 39
        assert set(result["metrics"]) <= {"recall", "bertscore"} and not result["unscored"] | result["not_computed"]
    seed = next(result for result in results if result["task"]["name"] == "granulon_seedbench_recall")
    (sample, *_) = read_samples(next((tmp_path / "results" / "runs").glob("*seedbench*")))
    assert (
        sample["question"].endswith("\n(Answer with the option content)")
        and sample["references"][0] in sample["question"]
    )
    assert seed["data"] == {"path": "lmms-lab-encoder/SEED-Bench", "revision": "main"}
    main([*options, "--tasks", "granulon_seedbench_recall", "--protocol", OURS])
    assert len(asked) == 8 * len(TASKS) + 8, "a run of the other protocol"
    table = (tmp_path / "results" / "tables" / "results.md").read_text()
    assert "granulon_seedbench_recall recall (authors' protocol)" in table
    assert "| granulon_seedbench_recall recall |" in table and "not run" not in table
    main([*options, "--tasks", *TASKS, "--protocol", AUTHORS])
    assert len(asked) == 8 * len(TASKS) + 8, "finished runs are not repeated"


def test_a_protocol_without_any_of_the_tasks_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="the protocol authors has only the tasks granulon_seedbench_recall, "):
        main(["--model", "m", "--tasks", "pope", "--protocol", AUTHORS, "--output", str(tmp_path)])
