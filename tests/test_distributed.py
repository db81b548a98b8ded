"""Two processes over gloo train as one process does that sees the same global batch."""

import json
import subprocess
import sys

import pytest
from test_checkpoints import ENVIRONMENT, SCRIPT, losses, run_all
from training_run import make_base

IN_ORDER = {"train_sampling_strategy": "sequential", "save_strategy": "no", "learning_rate": 1e-4}
RUN = {"steps": 20, "accumulate": 2, "count": 36, "arguments": IN_ORDER}


def run_two(folder, run):
    """The result of a run in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    task = json.dumps({"folder": str(folder), "runs": [run]})
    done = subprocess.run([*command, task], env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(next(line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    make_base(folder / "base", dropout=0.0)
    return folder


def assert_same_training(folder, run):
    """Runs `run` in one process and in two, and compares; both results."""
    (one,) = run_all(folder, [{**run, "name": "one", "batch": 4}])
    two = run_two(folder, {**run, "name": "two", "batch": 2})
    for step, (entry,) in losses(folder, "one").items():
        (other,) = losses(folder, "two")[step]
        assert other == pytest.approx(entry, rel=1e-6), f"step {step}"
    assert two["unchanged"] == one["unchanged"]
    assert two["tied"] and one["tied"]
    return one, two
