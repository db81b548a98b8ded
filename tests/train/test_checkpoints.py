"""A run that is killed resumes from its newest complete checkpoint and ends with the same weights."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from training_run import make_base
from transformers.trainer_utils import get_last_checkpoint

from granulon.train.checkpoints import MARKER, is_complete, newest_complete, resume_point, write_marker

SCRIPT = Path(__file__).parents[1] / "training_run.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
FOUR_STEPS = {"steps": 4}  # saves after 2 and 4; the second save deletes the first
KILLED = -9


def run_all(folder, runs):
    """The results of runs of training_run.py, one after the other."""
    task = json.dumps({"folder": str(folder), "runs": runs})
    done = subprocess.run([sys.executable, SCRIPT, task], env=ENVIRONMENT, capture_output=True, text=True)
    results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(results) == len(runs), done.stderr[-3000:]
    for run, result in zip(runs, results):
        if "kill_at" not in run and "kill_after" not in run:
            assert result["exit"] == 0, done.stderr[-3000:]
    return results


def losses(folder, name):
    """All losses that were logged for each step."""
    logged = {}
    for line in (folder / name / "losses.jsonl").read_text().splitlines():
        entry = json.loads(line)
        logged.setdefault(entry["step"], set()).add((entry["loss"], entry["grad_norm"], entry["learning_rate"]))
    return logged


def killed_and_resumed(kills):
    """Two runs for each kill: the killed one, and one that resumes."""
    return [
        {**FOUR_STEPS, "name": f"kill-{number}", **extra}
        for number, kill in enumerate(kills)
        for extra in (kill, {"resume": True})
    ]


def assert_same_end(folder, kills):
    (uninterrupted,) = run_all(folder, [{**FOUR_STEPS, "name": "uninterrupted"}])
    results = run_all(folder, killed_and_resumed(kills))
    expected = losses(folder, "uninterrupted")
    for number, (kill, killed, resumed) in enumerate(zip(kills, results[::2], results[1::2])):
        assert killed["exit"] == KILLED or "kill_after" in kill, f"{kill} did not kill"
        assert resumed["hash"] == uninterrupted["hash"], f"other weights after {kill}"
        assert losses(folder, f"kill-{number}") == expected, f"other losses after {kill}"
        assert newest_complete(folder / f"kill-{number}").name == "checkpoint-4"
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    make_base(folder / "base", dropout=0.1)  # so that the random state matters
    return folder


@pytest.fixture(scope="module")
def writes(folder):
    """How often the saves of a run write, and how long it takes in seconds."""
    (result,) = run_all(folder, [{**FOUR_STEPS, "name": "counted"}])
    return result["writes"], result["seconds"]


def test_a_run_killed_in_a_save_ends_with_the_same_weights_and_losses(folder, writes):
    first_save, second_save, rotation = 8, writes[0] // 2 + 8, writes[0] - 8
    kills = [
        {"kill_at": first_save, "torn": True},
        {"kill_at": second_save, "torn": True},
        {"kill_at": rotation},
    ]
    results = assert_same_end(folder, kills)
    assert [resumed["resumed"] for resumed in results[1::2]] == [None, "checkpoint-2", "checkpoint-4"]


@pytest.mark.slow
@pytest.mark.parametrize("torn", [False, True], ids=["between writes", "within a write"])
def test_a_run_killed_at_any_write_of_a_save_ends_with_the_same_weights_and_losses(folder, writes, torn):
    assert_same_end(folder, [{"kill_at": number, "torn": torn} for number in range(writes[0])])


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_weights_and_losses(folder, writes):
    moments = random.Random(0)
    results = assert_same_end(folder, [{"kill_after": moments.uniform(0, writes[1])} for _ in range(20)])
    assert sum(killed["exit"] == KILLED for killed in results[::2]) >= 10


@pytest.mark.slow
def test_a_run_killed_again_and_again_still_ends_with_the_same_weights(folder, writes):
    (uninterrupted,) = run_all(folder, [{"name": "whole", "steps": 12}])
    kills = [{"name": "often", "steps": 12, "resume": True, "kill_at": writes[0] // 2 + 5} for _ in range(4)]
    *_, last = run_all(folder, [*kills, {"name": "often", "steps": 12, "resume": True}])
    assert last["hash"] == uninterrupted["hash"]


LOAD = """
import sys, json, torch
sys.modules |= {"granulon": None, "modeling_granulon": None}  # neither can be imported
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
inputs = processor(text="How many?", return_tensors="pt")
with torch.no_grad():
    print(json.dumps(model(**inputs).logits.sum().item()))
"""


def logits_without_our_packages(model, scratch):
    """The sum of a prompt's logits, from a copy of the folder in a process that has no package but transformers."""
    checkpoint = shutil.copytree(model, scratch / "elsewhere" / "model")
    environment = {**ENVIRONMENT, "HF_HOME": str(scratch / "home"), "HF_MODULES_CACHE": str(scratch / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, checkpoint], cwd=scratch, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_checkpoint_is_self_contained(folder, writes, tmp_path):
    checkpoint = newest_complete(folder / "counted")
    assert math.isfinite(logits_without_our_packages(checkpoint, tmp_path))
    assert (checkpoint / "licences" / "vision" / "LICENSE.md").read_text() == "the tower's licence\n"
    assert (checkpoint / "granulon_manifest.json").exists()
    assert is_complete(checkpoint)


def make_checkpoint(folder, step, complete=True):
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "inner").mkdir(parents=True)
    for name in ("model.safetensors", "inner/rank_0", "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"):
        (checkpoint / name).write_bytes(b"content")
    if complete:
        write_marker(checkpoint)
    return checkpoint


def test_the_newest_complete_checkpoint_is_that_of_the_highest_step(tmp_path):
    for step in (9, 10, 100):
        make_checkpoint(tmp_path, step)
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-100"


def test_no_folder_and_an_empty_folder_have_no_complete_checkpoint(tmp_path):
    assert newest_complete(tmp_path) is None
    assert newest_complete(tmp_path / "absent") is None
    assert resume_point(tmp_path / "absent") is None


@pytest.mark.parametrize("name", ["model.safetensors", "inner/rank_0", MARKER])
@pytest.mark.parametrize("damage", ["absent", "shorter", "longer"])
def test_a_checkpoint_with_a_damaged_file_is_not_complete(tmp_path, name, damage):
    file = make_checkpoint(tmp_path, 3) / name
    if damage == "absent":
        file.unlink()
    elif damage == "shorter":
        file.write_bytes(file.read_bytes()[:-4])
    elif name == MARKER:
        file.write_bytes(file.read_bytes() + b"}")
    else:
        file.write_bytes(file.read_bytes() + b"more")
    assert newest_complete(tmp_path) is None


def test_no_marker_is_written_while_the_file_of_a_process_is_missing(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 3, complete=False)
    with pytest.raises(FileNotFoundError, match="rng_state_2.pth .1 of 3 .*shared|rng_state_2.pth .*share"):
        write_marker(checkpoint, [f"rng_state_{rank}.pth" for rank in range(3)])
    assert not is_complete(checkpoint)


def test_resuming_deletes_incomplete_checkpoints_and_renames_those_without_a_marker(tmp_path):
    whole = make_checkpoint(tmp_path, 2)
    make_checkpoint(tmp_path, 4, complete=False)
    (make_checkpoint(tmp_path, 6, complete=False) / "trainer_state.json").unlink()
    (make_checkpoint(tmp_path, 8) / "model.safetensors").unlink()
    assert resume_point(tmp_path) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "incomplete-checkpoint-4"]
    assert Path(get_last_checkpoint(tmp_path)) == whole
