"""`granulon-evaluate`: every task runs offline, what is done is not done again, bad input gets a clear message."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nltk
import numpy as np
import pytest
import spacy
import yaml
from conftest import count_calls
from test_metrics import make_bert

from granulon.evaluation import lmms_model
from granulon.evaluation.matrix import MATRICES, read_matrix, read_results, read_samples
from granulon.evaluation.metrics import BERTSCORE_LAYERS
from granulon.evaluation.run import main
from granulon.evaluation.sample_rows import MAX_NEW_TOKENS, SPLITS
from granulon.hub.assemble import assemble_tiny
from granulon.hub.inference import load_model

FILES = {file.stem for file in (MATRICES / "tasks").glob("*/granulon_*.yaml")}
OWN = {name for name in FILES if not name.endswith("_authors")}  # those are in test_protocols.py
WITH_LANGUAGE_DATA = {"coco_cap_chair", "amber_g"}
FIGURES = {
    "granulon_aokvqa_choice": {"choice_accuracy", "choice_unclear"},
    "granulon_aokvqa_direct": {"recall", "exact_match", "vqa_accuracy"},
    "granulon_cc12m": {"bertscore", "bleu", "recall"},
    "granulon_flux_reason": {"bertscore", "bleu", "recall"},
    "granulon_imagenet21k_recap": {"bertscore", "bleu", "recall"},
    "granulon_seedbench_recall": {"recall", "exact_match"},
    "granulon_surgvlm_instrument": {"bertscore", "recall", "exact_match"},
    "granulon_surgvlm_phase": {"bertscore", "recall", "exact_match"},
    "seedbench": {"seed_image", "seed_all"},
    "pope": {
        f"yes_no_{name}" for name in ("accuracy", "f1", "precision", "recall", "yes_rate", "always_yes", "unclear")
    },
    "gqa": {"exact_match"},
    "mmvp": {"mmvp_accuracy", "mmvp_pair_accuracy"},
    "cv_bench": {"cv_bench_acc"},
    "hallusion_bench_image": {"aAcc", "fAcc", "qAcc"},
    "coco_cap_chair": {"chair_i", "chair_s", "chair_cover"},
    "amber_g": {"amber_chair", "amber_cover", "amber_hal", "amber_cog"},
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(assemble_tiny(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def evaluate(tiny, bert, tmp_path):
    """Run the command on sample rows and give the finished runs by task."""

    def run(*options, output=tmp_path / "results", model=tiny):
        main(line(output, bert, *(["--model", model] if model else []), *options))
        return {result["task"]["name"]: result for result in read_results(output)}

    return run


def line(output, bert, *options):
    given = ["--output", output, "--sample_rows"]
    return [str(part) for part in (*given, "--bertscore_model", bert, *options)]


@pytest.fixture
def answered(monkeypatch):
    """The requests that a model is asked, as (task, sample)."""
    asked, answer = [], lmms_model.GranulonForEvaluation._answer

    def counted(self, requests):
        asked.extend((request.task_name, request.doc_id) for request in requests)
        return answer(self, requests)

    monkeypatch.setattr(lmms_model.GranulonForEvaluation, "_answer", counted)
    return asked


def scores(output):
    """What a rerun must not change: figures, answers, and what was seen."""
    return {
        result["run"]: (
            result["metrics"],
            result["seen"],
            [s["answer"] for s in read_samples(Path(result["folder"]))],
        )
        for result in read_results(output)
    }


def test_every_task_has_sample_rows_and_every_task_of_the_matrix_is_one():
    matrix = yaml.safe_load((MATRICES / "matrix.yaml").read_text())
    assert set(SPLITS) == set(FIGURES) == set(matrix["tasks"])
    assert OWN < set(SPLITS)


def test_every_task_of_ours_runs_offline_and_keeps_what_a_rerun_needs(evaluate, answered, tmp_path, capsys):
    found = evaluate("--tasks", *sorted(OWN), "--limit", "3")
    for task in OWN:
        result = found[task]
        assert set(result["metrics"]) == FIGURES[task] and result["not_computed"] == {} == result["unscored"]
        assert all(0 <= entry["value"] <= 100 and entry["n"] == 3 for entry in result["metrics"].values())
        assert len(result["model"]["sha256"]) == 64 and result["versions"]["lmms_eval"]
        for sample in read_samples(Path(result["folder"])):
            assert sample["granularity"] in ("coarse", "medium", "fine") and sample["pixel_tokens"] == 64
            assert 0 < sample["semantic_tokens"] <= 20 and sample["output_tokens"] <= MAX_NEW_TOKENS
            assert sample["question"] and sample["references"] and "answer" in sample
    assert len(answered) == 3 * len(OWN) and not list(tmp_path.rglob("answers.jsonl*"))
    said = capsys.readouterr().out
    assert "about" in said and "left" in said, "the time left is printed"
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("result.json")}
    evaluate("--tasks", *sorted(OWN), "--limit", "3")
    assert len(answered) == 3 * len(OWN) and before == {f: f.stat().st_mtime_ns for f in tmp_path.rglob("result.json")}


def test_one_answer_runs_each_part_once(evaluate, monkeypatch):
    calls, load_model = [], lmms_model.load_model

    def load_and_count(*arguments, **options):
        model = load_model(*arguments, **options)
        calls.append(count_calls(model))
        return model

    monkeypatch.setattr(lmms_model, "load_model", load_and_count)
    evaluate("--tasks", "granulon_surgvlm_phase", "--limit", "3", "--batch_size", "1")
    assert calls == [{"vision_tower": 3, "granularity_controller": 3, "aggregation": 3}]


def test_lmms_evals_own_tasks_run_offline_and_every_figure_has_an_interval(evaluate):
    tasks = sorted(set(FIGURES) - OWN - WITH_LANGUAGE_DATA)
    found = evaluate("--tasks", *tasks)
    for task in tasks:
        metrics = found[task]["metrics"]
        assert set(metrics) >= FIGURES[task], task
        defined = FIGURES[task] - {"yes_no_precision"}  # undefined for a model that never says yes
        assert all(metrics[name]["low"] is not None for name in defined), task


def write_language_data(folder):
    """NLTK's data and a spaCy model for a language of few words, in which every word is a noun."""
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        file = folder / "nltk_data" / "tokenizers" / "punkt_tab" / "english" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    tagger = folder / "nltk_data" / "taggers" / "averaged_perceptron_tagger_eng"
    tagger.mkdir(parents=True)
    for name, content in (("weights", {"bias": {"NN": 1.0}}), ("tagdict", {}), ("classes", ["NN"])):
        (tagger / f"averaged_perceptron_tagger_eng.{name}.json").write_text(json.dumps(content))
    wordnet = folder / "nltk_data" / "corpora" / "wordnet"
    wordnet.mkdir(parents=True)
    names = ("adj", "adv", "noun", "verb")
    for name in (
        "cntlist.rev",
        "lexnames",
        "index.sense",
        *(f"index.{n}" for n in names),
        *(f"data.{n}" for n in names),
    ):
        (wordnet / name).write_text("")
    for name in names:
        (wordnet / f"{name}.exc").write_text("")
    (wordnet / "lexnames").write_text("00\tnoun.Tops\t1\n")
    words = ("bird", "boat", "dog", "tree")
    (wordnet / "index.noun").write_text("".join(f"{word} n 1 0 1 0 00000001\n" for word in words))
    english = spacy.blank("en")
    for place, word in enumerate(words):
        english.vocab.set_vector(word, np.eye(len(words), dtype="float32")[place])
    english.to_disk(folder / "en_core_web_md")
    metadata = folder / "data" / "amber" / "metadata"
    metadata.mkdir(parents=True)
    (metadata / "relation.json").write_text(json.dumps({word: [] for word in ("bird", "boat", "dog", "tree")}))
    (metadata / "safe_words.txt").write_text("picture\n")
    (metadata / "annotations.json").write_text("[]")
    counts = ("chair_score", "chair_num", "safe_cover_score", "safe_cover_num", "hallu_cover_score")
    counts += ("hallu_cover_num", "non_hallu_score", "non_hallu_num")
    (metadata / "metrics.txt").write_text("".join(f"{name} = 0\n" for name in counts))


@pytest.fixture
def language_data(tmp_path, monkeypatch):
    write_language_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])


def test_chair_and_amber_count_hallucinated_objects(language_data, evaluate, monkeypatch):
    monkeypatch.setattr(lmms_model, "_cut", lambda text, until: "Two birds on a boat, and a dog.")
    found = evaluate("--tasks", "coco_cap_chair", "amber_g")
    chair = {name: entry["value"] for name, entry in found["coco_cap_chair"]["metrics"].items()}
    # Birds are there in all of eight rows, boats in every second, dogs in none.
    assert chair == {"chair_i": pytest.approx(50), "chair_s": 100, "chair_cover": 100}
    assert set(found["amber_g"]["metrics"]) == FIGURES["amber_g"]
    assert found["amber_g"]["metrics"]["amber_hal"]["value"] == 100, "no row has a dog"


def test_missing_data_for_scoring_are_reported_before_the_model_runs(evaluate, answered, monkeypatch, capsys):
    def missing(text):
        raise LookupError("no such resource")

    monkeypatch.setattr(nltk, "word_tokenize", missing)  # what it has read, it keeps
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        evaluate("--tasks", "coco_cap_chair")
    assert "python -m nltk.downloader punkt_tab" in capsys.readouterr().err and not answered


def test_a_killed_matrix_continues_without_repeating_finished_runs_or_answered_batches(
    evaluate, tiny, bert, answered, tmp_path
):
    kill_and_continue(evaluate, tiny, bert, answered, tmp_path, kills=1)


@pytest.mark.slow
def test_a_matrix_killed_several_times_continues(evaluate, tiny, bert, answered, tmp_path):
    kill_and_continue(evaluate, tiny, bert, answered, tmp_path, kills=4)


def write_matrix(folder, tiny):
    entries = [{"name": "one", "model": tiny}, {"name": "two", "model": tiny, "view": "semantic"}]
    tasks = ["granulon_aokvqa_choice", "granulon_surgvlm_phase"]
    (folder / "small.yaml").write_text(yaml.safe_dump({"entries": entries, "tasks": tasks}))
    return str(folder / "small.yaml")


def kill_and_continue(evaluate, tiny, bert, answered, tmp_path, kills):
    matrix, output, draws = write_matrix(tmp_path, tiny), tmp_path / "results", random.Random(kills)
    options = ("--matrix", matrix, "--batch_size", "1")
    command = [sys.executable, "-m", "granulon.evaluation.run", *line(output, bert, *options)]
    for _ in range(kills):
        before, wanted = len(kept(output)), draws.randint(2, 12)
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(kept(output)) < before + wanted and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    there, finished = kept(output), {file: file.stat().st_mtime_ns for file in output.rglob("result.json")}
    assert there
    evaluate(*options, model=None)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert len(answered) == 2 * 2 * 8 - len(there), "only the remaining questions are asked"
    evaluate(*options, model=None, output=tmp_path / "uninterrupted")
    assert scores(output) == scores(tmp_path / "uninterrupted")


def kept(output):
    """The answers that a killed run has left, by run: in its answer files, or in finished runs."""
    found = set()
    for folder in output.glob("runs/*"):
        names = ["samples.jsonl"] if (folder / "result.json").exists() else ["answers.jsonl*-of-*"]
        for file in [file for name in names for file in folder.glob(name)]:
            lines = file.read_bytes().split(b"\n")[:-1]
            found |= {(folder.name, number) for number in range(len(lines))}
    return found


def test_one_process_and_two_give_equal_scores(evaluate, tiny, bert, tmp_path):
    options = ("--matrix", write_matrix(tmp_path, tiny), "--batch_size", "2", "--limit", "5")
    evaluate(*options, model=None, output=tmp_path / "1")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "granulon.evaluation.run", *line(tmp_path / "2", bert, *options)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = scores(tmp_path / "1"), scores(tmp_path / "2")
    assert one == two and len(one) == 4
    assert {result["processes"] for result in read_results(tmp_path / "2")} == {2}


@pytest.mark.parametrize("overrides", [{}, {"controller": "random"}])
def test_the_size_of_a_batch_changes_no_answer_and_no_level(evaluate, tmp_path, overrides):
    for size in ("1", "5"):
        options = ("--tasks", "granulon_surgvlm_phase", "--overrides", json.dumps(overrides), "--batch_size", size)
        evaluate(*options, output=tmp_path / size)
    assert scores(tmp_path / "1") == scores(tmp_path / "5")
    levels = read_results(tmp_path / "1")[0]["seen"]["levels"]
    assert sum(levels.values()) == 8 and (len(levels) > 1 or not overrides)


def test_every_override_of_the_ablations_fits_a_model_of_three_levels(tiny):
    distinct = {
        json.dumps(entry.overrides): entry.overrides for entry in read_matrix("ablations").entries if entry.overrides
    }
    assert len(distinct) > 10
    for overrides in distinct.values():
        config = load_model(tiny, overrides=overrides).config
        for name, value in overrides.items():
            if name == "granularities":
                assert [level["keep"] for level in config.granularities] == [level["keep"] for level in value]
                assert config.max_semantic_tokens == max(level["keep"] for level in value)
            else:
                assert getattr(config, name) == value
    one = {"granularities": [{"name": "only", "stride": 1, "clusters": 6, "keep": 5}]}
    with pytest.raises(ValueError, match="keep the number of levels"):
        load_model(tiny, overrides=one)


def test_another_level_view_or_override_is_another_run(evaluate, answered):
    task = ("--tasks", "granulon_aokvqa_choice", "--limit", "2")
    seen = []
    for options in (
        (),
        ("--granularity", "fine"),
        ("--view", "semantic"),
        ("--overrides", '{"controller": "random"}'),
    ):
        evaluate(*task, *options)
        seen.append(len(answered))
    assert seen == [2, 4, 6, 8]


def test_a_figure_that_was_not_computed_is_reported_and_its_answers_are_kept(
    evaluate, answered, bert, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(lmms_model, "_cut", lambda text, until: "a grasper")
    missing = str(tmp_path / "no-bert")
    with pytest.raises(SystemExit) as ended:
        evaluate("--tasks", "granulon_surgvlm_phase", "--limit", "2", "--bertscore_model", missing)
    assert ended.value.code == 2
    (result,) = read_results(tmp_path / "results")
    assert "was not found" in result["not_computed"]["bertscore"] and set(result["metrics"]) == {
        "recall",
        "exact_match",
    }
    said = capsys.readouterr()
    assert "run again to score the same answers" in said.out and "these figures were not computed" in said.err
    Path(missing).symlink_to(bert)
    again = evaluate("--tasks", "granulon_surgvlm_phase", "--limit", "2", "--bertscore_model", missing)
    assert "bertscore" in again["granulon_surgvlm_phase"]["metrics"] and len(answered) == 2


def test_another_bertscore_model_scores_the_same_answers(evaluate, answered, bert, tmp_path, monkeypatch):
    monkeypatch.setattr(lmms_model, "_cut", lambda text, until: "a grasper and a hook")
    other = str(tmp_path / "other-bert")
    Path(other).symlink_to(bert)
    monkeypatch.setitem(BERTSCORE_LAYERS, other, 1)
    tasks = ("--tasks", "granulon_surgvlm_phase", "pope", "--limit", "3")
    first = evaluate(*tasks)
    asked = len(answered)
    again = evaluate(*tasks, "--bertscore_model", other)
    assert len(answered) == asked
    name = "granulon_surgvlm_phase"
    values = [found[name]["metrics"]["bertscore"]["value"] for found in (first, again)]
    assert values[0] != values[1] and first[name]["metrics"]["recall"] == again[name]["metrics"]["recall"]
    assert first["pope"]["finished_at"] == again["pope"]["finished_at"]
    assert evaluate(*tasks)[name]["metrics"] == first[name]["metrics"] and len(answered) == asked


def test_entries_with_the_same_weights_and_settings_share_a_run(evaluate, answered, tiny, tmp_path):
    """Every entry has its figures in the tables; the questions are asked once."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(tiny)
    own = json.loads(Path(tiny, "config.json").read_text())["relation_weight"]
    entries = [
        {"name": "one", "model": tiny},
        {"name": "other", "model": str(elsewhere)},
        {"name": "said", "group": "again", "model": tiny, "overrides": {"relation_weight": own}},
    ]
    matrix = tmp_path / "matrix.yaml"
    matrix.write_text(yaml.safe_dump({"entries": entries, "tasks": ["granulon_aokvqa_choice"]}))
    evaluate("--matrix", str(matrix), "--limit", "2", model=None)
    assert len(answered) == 2
    table = (tmp_path / "results" / "tables" / "results.md").read_text()
    assert all(name in table for name in ("one", "other", "said")) and "not run" not in table
    entries[0]["name"] = "renamed"
    matrix.write_text(yaml.safe_dump({"entries": entries, "tasks": ["granulon_aokvqa_choice"]}))
    evaluate("--matrix", str(matrix), "--limit", "2", "--only", "renamed", model=None)
    table = (tmp_path / "results" / "tables" / "results.md").read_text()
    assert len(answered) == 2 and "not run" not in table
    assert all(name in table for name in ("renamed", "other", "said")), "tables are of the whole matrix"


def test_rows_of_the_data_have_different_hashes(evaluate):
    (result,) = evaluate("--tasks", "granulon_aokvqa_choice", "--limit", "3").values()
    hashes = [sample["doc_sha256"] for sample in read_samples(Path(result["folder"]))]
    assert len(set(hashes)) == 3


def test_a_failing_run_does_not_end_the_others(evaluate, tiny, tmp_path, capsys):
    entries = [
        {"name": "gone", "model": "runs/none/model", "made_by": "granulon-train --config none"},
        {"name": "levelless", "model": tiny, "overrides": {"granularities": []}, "granularity": "fine"},
        {"name": "there", "model": tiny},
    ]
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"entries": entries, "tasks": ["granulon_aokvqa_choice"]}))
    with pytest.raises(SystemExit, match="2 of 3 runs failed; run the same command to retry"):
        evaluate("--matrix", tmp_path / "m.yaml", "--limit", "2", model=None)
    assert [result["entry"]["name"] for result in read_results(tmp_path / "results")] == ["there"]
    printed = capsys.readouterr().err
    assert (
        "runs/none/model was not found locally or on the Hub" in printed
        and "make it with: granulon-train --config none" in printed
    )
    assert "this model has no levels; leave it out" in printed
    text = (tmp_path / "results" / "tables" / "results.md").read_text()
    assert text.count("not run") == 4, "two runs, two figures each"


def test_a_model_without_levels_is_evaluated_as_the_plain_encoder(evaluate):
    found = evaluate("--tasks", "granulon_aokvqa_choice", "--limit", "2", "--overrides", '{"granularities": []}')
    (sample, _) = read_samples(Path(found["granulon_aokvqa_choice"]["folder"]))
    assert sample["granularity"] is None and sample["semantic_tokens"] == 0 and sample["pixel_tokens"] == 64


@pytest.mark.parametrize(
    "options, message",
    [
        (("--tasks", "granulon_aokvqa_choise"), "no task granulon_aokvqa_choise; did you mean granulon_aokvqa_choice"),
        (("--tasks", "mmbench"), "mmbench is a group of tasks; name the tasks themselves: mmbench_en"),
        (("--tasks", "granulon_aokvqa_choice", "--granularity", "huge"), "huge"),
        (("--tasks", "granulon_aokvqa_choice", "--overrides", '{"hue": 1}'), "the configuration has no hue"),
        (("--tasks", "granulon_aokvqa_choice", "--overrides", "{"), "overrides is not JSON"),
        (("--tasks", "granulon_aokvqa_choice", "--limit", "0"), "limit is 0; it must be at least 1"),
        ((), "name the --tasks"),
    ],
)
def test_invalid_options_are_refused_with_a_message(evaluate, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        evaluate(*options)
    assert re.search(message, f"{stop.value} {capsys.readouterr().err}")


def test_missing_data_are_named(tiny, bert, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--output", "results", "--model", tiny, "--tasks", "granulon_surgvlm_phase"]
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        main(options)
    assert "the data of granulon_surgvlm_phase (data/surgvlm/phase) were not found" in capsys.readouterr().err


def test_the_entry_point_of_lmms_eval_names_the_model():
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="lmms_eval.models", name="granulon")
    assert entry.load() is lmms_model.MANIFEST


def test_the_package_imports_without_lmms_eval():
    code = (
        "import sys; sys.modules['lmms_eval'] = None; import granulon.evaluation.run as run, "
        "granulon.evaluation.judge.run, granulon.evaluation.tables, granulon.evaluation.metrics; "
        "run.main(['--model', 'x', '--tasks', 'y', '--output', 'z'])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and "is not installed: pip install" in done.stderr
