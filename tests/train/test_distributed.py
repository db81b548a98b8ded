"""Two processes over gloo train as one process does that sees the same global batch."""

import json
import subprocess
import sys

import pytest
from test_checkpoints import ENVIRONMENT, SCRIPT, losses, run_all
from training_run import make_base

IN_ORDER = {"train_sampling_strategy": "sequential", "save_strategy": "no", "learning_rate": 1e-4}
WEIGHTS = (0.1, pytest.param(0.0, marks=pytest.mark.slow))  # of the controller's loss
RUN = {"steps": 4, "accumulate": 2, "count": 36, "arguments": IN_ORDER}


def run_two(folder, run):
    """The result of a run in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    task = json.dumps({"folder": str(folder), "runs": [run]})
    done = subprocess.run([*command, task], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(next(line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    make_base(folder / "base", dropout=0.0)
    return folder


def assert_same_training(folder, run):
    """Runs `run` in one process and in two, and compares; the names of the weights that stayed as they were."""
    weight = run["arguments"].get("granularity_loss_weight", 0.0)
    names = [f"{run['engine']}-{run['rows']}-{run['steps']}-{weight}-{count}" for count in ("one", "two")]
    (one,) = run_all(folder, [{**run, "name": names[0], "batch": 4}])
    two = run_two(folder, {**run, "name": names[1], "batch": 2})
    entries, others = (losses(folder, name) for name in names)
    assert len(entries) == run["steps"]
    for step, ((loss, norm, rate),) in entries.items():
        ((other_loss, other_norm, other_rate),) = others[step]
        assert other_loss == pytest.approx(loss, rel=1e-6), f"loss of step {step}"
        assert other_norm == pytest.approx(norm, rel=1e-4) and other_rate == rate, f"gradient of step {step}"
    assert two["unchanged"] == one["unchanged"]
    assert two["tied"] and one["tied"]
    return one["unchanged"]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_though_only_one_of_them_sees_images(folder, engine, weight):
    arguments = IN_ORDER | {"granularity_loss_weight": weight}
    unchanged = assert_same_training(folder, {**RUN, "engine": engine, "rows": "mixed", "arguments": arguments})
    assert ("model.granularity_controller.linear_2.bias" in unchanged) == (weight == 0)
    assert "model.vision_tower.embeddings.cls_token" in unchanged
    assert not any(name.startswith("model.language_model.layers") for name in unchanged)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("rows", ["mixed", "text"])
def test_two_processes_train_as_one_over_epochs(folder, engine, rows):
    unchanged = assert_same_training(folder, {**RUN, "steps": 20, "engine": engine, "rows": rows})
    if rows == "text":
        assert {name.split(".")[1] for name in unchanged} == {
            "vision_tower", "multi_modal_projector", "granularity_controller",
        }  # fmt: skip


@pytest.mark.slow
def test_two_processes_resume_where_they_were_killed(folder):
    settings = {**RUN, "batch": 2, "arguments": {"lr_scheduler_type": "constant"}}
    whole = run_two(folder, {**settings, "name": "whole"})
    run_two(folder, {**settings, "name": "halted", "steps": 2})
    resumed = run_two(folder, {**settings, "name": "halted", "resume": True})
    assert resumed["resumed"] == "checkpoint-2"
    assert resumed["hash"] == whole["hash"]
