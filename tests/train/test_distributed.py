"""Two processes over gloo train as one process does that sees the same global batch."""

import json
import socket
import subprocess
import sys

import pytest
from test_checkpoints import ENVIRONMENT, SCRIPT, losses, run_all
from training_run import make_base

IN_ORDER = {"train_sampling_strategy": "sequential", "save_strategy": "no", "learning_rate": 1e-4}
WEIGHTS = (0.1, pytest.param(0.0, marks=pytest.mark.slow))  # of the controller's loss
LOAD = """
import hashlib, json, sys
sys.modules["granulon"] = sys.modules["modeling_granulon"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
model, report = AutoModelForImageTextToText.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True
)
assert not report["missing_keys"] and not report["unexpected_keys"], report
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
digest = hashlib.sha256()
for name, value in sorted(model.state_dict().items()):
    digest.update(name.encode() + value.contiguous().numpy().tobytes())
classes = [type(model).__name__, type(processor).__name__]
print("RESULT " + json.dumps({"classes": classes, "hash": digest.hexdigest()}))
"""
RUN = {"steps": 4, "accumulate": 2, "count": 36, "arguments": IN_ORDER}


def run_two(folder, run):
    """The result of a run in two processes; None for one that is killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    task = json.dumps({"folder": str(folder), "runs": [run]})
    done = subprocess.run([*command, task], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    if "kill_at" in run:
        assert done.returncode != 0, "nothing was killed"
        return None
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(next(line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")))


def load_elsewhere(folder):
    """The classes and the weights' hash of a saved model, in a process that knows none of our packages."""
    environment = {**ENVIRONMENT, "HF_MODULES_CACHE": str(folder.parent / "modules")}
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.split("RESULT ")[1])


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


def assert_killed_run_ends_as_one_process(folder, steps, kill_at, **options):
    """FSDP2 from the shipped file in two processes, killed while it saves and resumed, and the model that it saves."""
    arguments = {name: value for name, value in IN_ORDER.items() if name != "save_strategy"}
    run = {**RUN, "steps": steps, "save_steps": steps // 2, "engine": "fsdp2", "arguments": arguments}
    run_all(folder, [{**run, "name": "one", "batch": 4}])
    run_two(folder, {**run, **options, "name": "killed", "batch": 2, "kill_at": kill_at})
    result = run_two(folder, {**run, **options, "name": "killed", "batch": 2, "resume": True, "save": True})
    assert result["resumed"] == f"checkpoint-{steps // 2}"
    two = losses(folder, "killed")
    for step, ((loss, *_),) in losses(folder, "one").items():
        assert [other for other, *_ in two[step]] == pytest.approx([loss] * len(two[step]), rel=1e-6), step
    model = folder / "killed" / "model"
    assert not list(model.glob("*fsdp*"))
    assert load_elsewhere(model) == {
        "classes": ["GranulonForConditionalGeneration", "GranulonProcessor"], "hash": result["hash"],
    }  # fmt: skip


@pytest.mark.parametrize("tower", ["dinov3", pytest.param("clip", marks=pytest.mark.slow), "siglip"])
def test_fsdp2_resumes_and_saves_a_model_that_loads_without_this_package(tmp_path, tower):
    make_base(tmp_path / "base", dropout=0.0, tower=tower)
    assert_killed_run_ends_as_one_process(tmp_path, steps=4, kill_at=70)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_fsdp2_gives_the_losses_of_one_process_for_fifty_steps_though_it_was_killed(folder, kind):
    assert_killed_run_ends_as_one_process(folder, steps=50, kill_at=70, state_dict_type=kind)


@pytest.mark.slow
def test_two_nodes_meet_and_train_as_one_process(folder):
    run = {**RUN, "steps": 2, "engine": "ddp", "batch": 1, "name": "nodes"}
    task = json.dumps({"folder": str(folder), "runs": [run]})
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2",
        "--rdzv_id", "granulon", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}",
        str(SCRIPT), task,
    ]  # fmt: skip
    nodes = [subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    run_all(folder, [{**run, "name": "alone", "batch": 4}])
    for step, ((loss, *_),) in losses(folder, "alone").items():
        assert next(iter(losses(folder, "nodes")[step]))[0] == pytest.approx(loss, rel=1e-6)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
