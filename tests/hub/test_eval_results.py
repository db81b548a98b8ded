"""What granulon-evaluate found reaches the card: of these weights, as they answer by themselves, and nothing else."""

import json

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from granulon.evaluation.matrix import model_identity
from granulon.hub.eval_results import eval_results, weights_sha256


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "granulon_manifest.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def cell(checkpoint, tmp_path):
    """Writes a finished cell, changed as told by the dotted names of its entries."""

    def write(name="pope-1", **changes):
        entry = {"value": 0.86123, "low": 0.84, "high": 0.88, "n": 9000, "higher_is_better": True}
        result = {
            "entry": {"model": str(checkpoint), "granularity": None, "view": "full", "overrides": {}},
            "task": {"name": "pope", "config": {"dataset_path": "lmms-lab-encoder/POPE"}},
            "settings": {"limit": None, "sample_rows": False},
            "model": {"sha256": weights_sha256(checkpoint)},
            "metrics": {"pope_accuracy": entry, "pope_recall": {"value": None, "low": None, "high": None, "n": 0}},
            "not_computed": {},
            "finished_at": "2026-01-02T03:04:05+00:00",
        }
        for path, value in changes.items():
            *parents, last = path.split("__")
            place = result
            for parent in parents:
                place = place[parent]
            place[last] = value
        folder = tmp_path / "results" / "runs" / name
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))
        return tmp_path / "results"

    return write


def entries(files, name):
    return parse_eval_result_entries(yaml.safe_load(files[f".eval_results/{name}.yaml"]))


def test_a_finished_cell_becomes_a_file_that_the_hub_reads(cell, checkpoint):
    files = eval_results(cell(), checkpoint)
    assert list(files) == [".eval_results/pope.yaml"]
    (entry,) = entries(files, "pope")
    assert (entry.dataset_id, entry.task_id, entry.value) == ("lmms-lab-encoder/POPE", "pope.pope_accuracy", 0.8612)
    assert entry.notes == "95% interval 0.8400 to 0.8800, n = 9000" and entry.date.startswith("2026-01-02T03:04:05")


def test_of_a_task_the_newest_result_counts(cell, checkpoint):
    newer = {"value": 0.9, "low": 0.8, "high": 1.0, "n": 1}
    cell("a", finished_at="2026-02-01T00:00:00+00:00", metrics={"accuracy": newer})
    files = eval_results(cell("b"), checkpoint)
    assert [entry.value for entry in entries(files, "pope")] == [0.9]


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"sha256": "of other weights"}},
        {"model": {"revision": "abc"}},
        {"not_computed": {"bertscore": "no network"}},
        {"entry__granularity": "fine"},
        {"entry__view": "semantic"},
        {"entry__overrides": {"controller": "random"}},
        {"settings__limit": 10},
        {"settings__sample_rows": True},
        {"task__config": {"dataset_path": "data/surgvlm/phase"}},
    ],
)
def test_a_cell_that_tells_of_something_else_does_not_count(cell, checkpoint, change):
    with pytest.raises(ValueError, match="of 1 cells in .* none is about"):
        eval_results(cell(**change), checkpoint)


def test_weights_are_known_by_the_hash_that_the_evaluation_knows_them_by(checkpoint):
    assert model_identity(str(checkpoint), "main")["sha256"] == weights_sha256(checkpoint)
