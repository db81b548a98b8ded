"""Several processes over gloo, launched with the cluster files that ship, train as one process does."""

import json
import socket
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from conftest import DECODERS, TOWERS, make_model
from test_checkpoints import ENVIRONMENT, SCRIPT, logits_without_our_packages, losses, run_all
from training_run import make_base

from granulon.train.sft import RECIPES
from granulon.train.sharding import gradient_norms, set_up_sharding

CLUSTER = RECIPES.parent / "cluster"
IN_ORDER = {"train_sampling_strategy": "sequential", "save_strategy": "no", "learning_rate": 1e-4}
WEIGHTS = (0.1, pytest.param(0.0, marks=pytest.mark.slow))  # of the controller's loss
RUN = {"steps": 4, "accumulate": 2, "count": 36, "arguments": IN_ORDER}
SHARDED = ("--fsdp_state_dict_type", "SHARDED_STATE_DICT")
RESUMABLE = IN_ORDER | {"save_strategy": "steps", "granularity_loss_weight": 0.1}


def launched(folder, run, *options):
    """What became of two processes with the cluster file of their engine; a CPU computes in float32."""
    file = ["--config_file", str(CLUSTER / f"{run['engine']}.yaml")]
    command = [sys.executable, "-m", "accelerate.commands.launch", *file, "--num_processes", "2", *options]
    command += ["--mixed_precision", "no", "--main_process_port", "0", str(SCRIPT)]
    task = json.dumps({"folder": str(folder), "runs": [run]})
    environment = ENVIRONMENT | {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    return subprocess.run([*command, task], env=environment, capture_output=True, text=True, timeout=300)


def result_of(done):
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(next(line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")))


def run_two(folder, run, *options):
    """The result of a run in two processes."""
    return result_of(launched(folder, run, *options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    make_base(folder / "base", dropout=0.0)
    return folder


def assert_same_losses(entries, others, steps):
    assert len(entries) == steps
    for step, ((loss, norm, rate),) in entries.items():
        for other_loss, other_norm, other_rate in others[step]:  # a step that was repeated has two
            assert other_loss == pytest.approx(loss, rel=1e-6), f"loss of step {step}"
            assert other_norm == pytest.approx(norm, rel=1e-4) and other_rate == rate, f"gradient of step {step}"


def assert_same_training(folder, run):
    """Runs `run` in one process and in two, and compares; the names of the weights that stayed as they were."""
    weight = run["arguments"].get("granularity_loss_weight", 0.0)
    names = [f"{run['engine']}-{run['rows']}-{run['steps']}-{weight}-{count}" for count in ("one", "two")]
    (one,) = run_all(folder, [{**run, "name": names[0], "batch": 4}])
    two = run_two(folder, {**run, "name": names[1], "batch": 2})
    assert_same_losses(*(losses(folder, name) for name in names), run["steps"])
    assert two["unchanged"] == one["unchanged"]
    assert two["tied"] and one["tied"]
    return one["unchanged"]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
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
    settings = {**RUN, "batch": 2, "engine": "ddp", "arguments": {"lr_scheduler_type": "constant"}}
    whole = run_two(folder, {**settings, "name": "whole"})
    run_two(folder, {**settings, "name": "halted", "steps": 2})
    resumed = run_two(folder, {**settings, "name": "halted", "resume": True})
    assert resumed["resumed"] == "checkpoint-2"
    assert resumed["hash"] == whole["hash"]


def assert_fsdp_finishes(folder, tmp_path, steps, save_steps, kill_in_step, *options):
    """FSDP2 is killed, resumes, evaluates and saves: losses as in one process, and a model that loads anywhere."""
    run = {**RUN, "steps": steps, "save_steps": save_steps, "arguments": RESUMABLE, "finish": True}
    name = f"fsdp2-{steps}{''.join(options)}"
    (one,) = run_all(folder, [{**run, "name": f"one-{name}", "batch": 4}])
    run |= {"name": name, "engine": "fsdp2", "batch": 2}
    assert launched(folder, {**run, "kill_in_step": kill_in_step}, *options).returncode != 0
    two = run_two(folder, {**run, "resume": True}, *options)
    assert two["resumed"] == f"checkpoint-{(kill_in_step - 1) // save_steps * save_steps}"
    assert_same_losses(losses(folder, f"one-{name}"), losses(folder, name), steps)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-6)
    assert two["unchanged"] == one["unchanged"] and two["tied"] == one["tied"]
    assert not any("Tower" in kind or "ViT" in kind or "CLIP" in kind or "Siglip" in kind for kind in two["wrapped"])
    assert "FSDPQwen2DecoderLayer" in two["wrapped"]
    expected = logits_without_our_packages(folder / f"one-{name}" / "model", tmp_path / "one")
    saved = folder / name / "model"
    assert logits_without_our_packages(saved, tmp_path / "model") == pytest.approx(expected, rel=1e-5)
    code = {file.name for file in saved.glob("*.py")}
    assert code == {file.name for file in (folder / f"one-{name}" / "model").glob("*.py")}
    if not options:
        checkpoint = folder / name / f"checkpoint-{steps}"
        assert logits_without_our_packages(checkpoint, tmp_path / "checkpoint") == pytest.approx(expected, rel=1e-5)


def test_fsdp_trains_as_one_process_is_killed_resumes_and_saves_a_model_that_loads_anywhere(folder, tmp_path):
    assert_fsdp_finishes(folder, tmp_path, 5, 2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), SHARDED], ids=["full", "sharded"])
def test_fsdp_trains_fifty_steps_as_one_process_is_killed_and_resumes(folder, tmp_path, options):
    assert_fsdp_finishes(folder, tmp_path, 50, 10, 27, *options)


@pytest.mark.slow
@pytest.mark.parametrize("tower, tied", [
    ("clip", True), ("siglip", True),
    ("siglip", False),
])  # fmt: skip
def test_fsdp_finishes_with_towers_that_name_absent_layers_and_with_a_head_of_its_own(tmp_path, tower, tied):
    make_base(tmp_path / "base", dropout=0.0, tower=tower, tied=tied)
    assert_fsdp_finishes(tmp_path, tmp_path / "loaded", 5, 2, 4)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("tower", TOWERS)
def test_fsdp_wraps_the_decoders_layers_alone_and_adds_gradients_in_float32(tower, decoder):
    model, config = make_model(tower, decoder), yaml.safe_load((CLUSTER / "fsdp2.yaml").read_text())
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=config["fsdp_config"]["fsdp_version"],
        auto_wrap_policy=config["fsdp_config"]["fsdp_auto_wrap_policy"],
        mixed_precision_policy=config["mixed_precision"],
    )
    set_up_sharding(type("State", (), {"fsdp_plugin": plugin}), model.model)
    plugin.set_auto_wrap_policy(model)
    layers = {type(layer) for layer in model.model.language_model.layers}
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == layers
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16
    assert plugin.mixed_precision_policy.reduce_dtype == torch.float32


def test_deepspeed_whose_gradients_are_partitioned_gives_its_own_norm():
    engine = type("Engine", (), {"get_global_grad_norm": staticmethod(lambda: float("inf"))})
    parameter = torch.nn.Parameter(torch.zeros(2))  # without a gradient, as DeepSpeed leaves it
    assert gradient_norms({"projector": [parameter]}) == {}
    assert not gradient_norms({"projector": [parameter]}, engine)["the model"].isfinite()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
def test_zero2_trains_as_one_process_and_stops_at_a_gradient_that_is_not_finite(folder):
    run = {**RUN, "engine": "zero2", "batch": 2, "finish": True}
    (one,) = run_all(folder, [{**run, "name": "one-zero2", "batch": 4}])
    two = run_two(folder, {**run, "name": "two-zero2"})
    assert_same_losses(losses(folder, "one-zero2"), losses(folder, "two-zero2"), run["steps"])
    assert two["unchanged"] == one["unchanged"]
    stopped = launched(folder, {**run, "name": "infinite", "infinite_in_step": 3})
    assert "step 3: the gradient of the model is not finite; the weights were not changed" in stopped.stderr
    assert max(losses(folder, "infinite")) == 2


@pytest.mark.slow
def test_two_nodes_of_two_processes_train_as_one_process(folder):
    run = {**RUN, "engine": "ddp", "rows": "mixed"}
    run_all(folder, [{**run, "name": "one-node", "batch": 4}])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_id", "granulon", "--rdzv_endpoint", endpoint, str(SCRIPT)]
    task = json.dumps({"folder": str(folder), "runs": [{**run, "name": "two-nodes", "batch": 1}]})
    nodes = [subprocess.Popen([*command, task], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for node in nodes:
        errors = node.communicate(timeout=300)[1]
        assert node.returncode == 0, errors[-4000:]
    assert_same_losses(losses(folder, "one-node"), losses(folder, "two-nodes"), run["steps"])
