"""`granulon-train`: what learns in which stage, what is left behind, and what is refused before training."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import LEVELS, make_image, make_inputs, make_model, make_processor
from fake_hub import FakeHub
from huggingface_hub import HfApi
from peft import PeftModel
from published_files import make_checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from transformers.utils import is_bitsandbytes_available

from granulon.hub.inference import load_model
from granulon.train import sft
from granulon.train.checkpoints import newest_complete
from granulon.train.data.sources import DataSource, drawn_rows
from granulon.train.stages import set_trainable

MANIFEST = "granulon_manifest.json"
RECIPE = {
    "stage": "sft",
    "dtype": "float32",
    "per_device_train_batch_size": 4,
    "learning_rate": 1.0e-3,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "data": [{"path": "scenes", "split": "train[:3]"}],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small checkpoint as granulon-assemble leaves it."""
    folder = tmp_path_factory.mktemp("base")
    levels = [{**level, "name": name} for level, name in zip(LEVELS, ("coarse", "fine"), strict=True)]
    levels.insert(1, {"name": "medium", "stride": 1, "clusters": 4, "keep": 3, "view": "full"})
    model = make_model(tie_word_embeddings=True, granularities=levels)
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    (folder / MANIFEST).write_text('{"image_token": "<|image_pad|>"}\n')
    (folder / "licences" / "vision").mkdir(parents=True)
    (folder / "licences" / "vision" / "LICENSE.md").write_text("the tower's licence\n")
    return folder


@pytest.fixture
def command(base, tmp_path):
    """Makes a command line: a recipe of the given settings, and the output folder."""

    def make(*options, **settings):
        output = settings.pop("output_dir", tmp_path / "run")
        values = {**RECIPE, "model_name_or_path": str(base), "output_dir": str(output), **settings}
        recipe = tmp_path / "own.yaml"
        recipe.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
        return ["--config", str(recipe), *options]

    return make


def weights(folder):
    return load_model(str(folder)).state_dict()


def changed(folder, base):
    before, after = weights(base), weights(folder)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def answer(model, processor):
    inputs = make_inputs(processor, ["What is inside the object?"], [[make_image(3)]])
    with torch.no_grad():
        return model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)


class SignalAt(TrainerCallback):
    def __init__(self, step, number):
        self.step, self.number, self.events = step, number, []

    def on_save(self, args, state, control, **kwargs):
        self.events.append(f"save {state.global_step}")

    def on_evaluate(self, args, state, control, **kwargs):
        self.events.append("evaluate")

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def test_alignment_changes_projector_and_gains_alone(command, base, tmp_path):
    sft.main(command(stage="align"))
    names = changed(tmp_path / "run/model", base)
    assert names and all(name.startswith("model.multi_modal_projector.") for name in names)
    assert "model.multi_modal_projector.gain_offsets" in names


def test_joint_tuning_changes_all_but_the_tower(command, base, tmp_path):
    sft.main(command(granularity_loss_weight=0.1))
    parts = {".".join(name.split(".")[:2]) for name in changed(tmp_path / "run/model", base)}
    assert parts == {
        "model.multi_modal_projector",
        "model.language_model",
        "model.granularity_controller",
        "lm_head.weight",
    }


def test_alignment_passes_over_batches_without_images(command, base, tmp_path):
    rows = [{"question": f"How many are {number}?", "answer": str(number)} for number in range(4)]
    (tmp_path / "text.json").write_text(json.dumps(rows))
    sft.main(command(stage="align", data=[str(tmp_path / "text.json")], max_steps=1))
    assert not changed(tmp_path / "run/model", base)


def test_the_model_is_self_contained(command, base, tmp_path):
    sft.main(command())
    folder = tmp_path / "run/model"
    assert (folder / "licences/vision/LICENSE.md").read_text() == "the tower's licence\n"
    assert not list(folder.glob("*.bin")), "a model has no pickle"
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(answer(model, processor)[0], answer(load_model(str(folder)), make_processor())[0])


def test_the_manifest_records_every_training(command, tmp_path):
    sft.main(command(stage="align", output_dir=tmp_path / "first"))
    sft.main(command("--learning_rate", "5e-4", "--seed=7", model_name_or_path=str(tmp_path / "first/model")))
    manifest = json.loads((tmp_path / "run/model" / MANIFEST).read_text())
    assert manifest["image_token"] == "<|image_pad|>"
    first, second = manifest["training"]
    assert (first["stage"], second["stage"]) == ("align", "sft")
    assert second["recipe"] == "own" and second["steps"] == 4 and second["rows"] == 21 and second["seed"] == 7
    assert second["settings"]["learning_rate"] == 5e-4, "the manifest records what overrides the recipe"
    assert second["settings"]["data"] == [{"path": "scenes", "split": "train[:3]"}]
    assert "output_dir" not in second["settings"] and "torch" in second["versions"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_after_the_step_and_the_resumed_run_ends_the_same(command, tmp_path, capsys, number):
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "eval_data": RECIPE["data"]}
    sft.main(command(output_dir=tmp_path / "whole", **settings))
    handlers = [signal.getsignal(entry) for entry in (signal.SIGTERM, signal.SIGUSR1)]
    signalled = SignalAt(1, number)
    sft.main(command(**settings), [signalled])
    assert signalled.events == ["save 2"], "saved once, and no time lost with an evaluation"
    assert [signal.getsignal(entry) for entry in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    assert newest_complete(tmp_path / "run").name == "checkpoint-2"
    assert not (tmp_path / "run/model").exists()
    assert "after step 2; continue with --resume" in capsys.readouterr().out
    sft.main(command("--resume", **settings))
    assert not changed(tmp_path / "run/model", tmp_path / "whole/model")


def test_resume_without_a_checkpoint_starts_at_step_0(command, tmp_path):
    sft.main(command("--resume", max_steps=1))
    assert (tmp_path / "run/model/config.json").exists()


def test_a_failed_save_leaves_the_older_model(command, tmp_path, monkeypatch):
    sft.main(command(max_steps=1, save_strategy="no"))
    before = sorted((tmp_path / "run/model").iterdir())

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(sft, "_add_documents", fail)
    with pytest.raises(OSError, match="no space left"):
        sft.main(command(max_steps=1, save_strategy="no"))
    assert sorted((tmp_path / "run/model").iterdir()) == before
    monkeypatch.undo()
    sft.main(command(max_steps=2, save_strategy="no"))
    assert json.loads((tmp_path / "run/model" / MANIFEST).read_text())["training"][0]["steps"] == 2
    assert [file.name for file in (tmp_path / "run").iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_merge_into_a_model_that_answers_the_same(command, base, tmp_path, dtype):
    sft.main(command("--merge", use_peft=True, lora_r=4, dtype=dtype, bf16=dtype == "bfloat16", learning_rate=0.01))
    adapter, merged = tmp_path / "run/adapter", tmp_path / "run/model"
    assert {file.name for file in adapter.glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert (adapter / "licences/vision/LICENSE.md").exists()
    names = changed(merged, base) if dtype == "float32" else set()
    assert not any(name.startswith("model.vision_tower.") or "embed_tokens" in name for name in names)
    with_adapter = PeftModel.from_pretrained(load_model(str(base), dtype=dtype), adapter).eval()
    model, processor = load_model(str(merged), dtype=dtype), AutoProcessor.from_pretrained(merged)
    logits, ids = answer(model, processor)
    tolerance = 1e-4 if dtype == "float32" else 0.1
    if dtype == "float32":
        torch.testing.assert_close(logits, answer(with_adapter, processor)[0], rtol=tolerance, atol=tolerance)
        assert not torch.allclose(logits, answer(load_model(str(base)), processor)[0], atol=1e-2), "nothing learned"
    assert model.dtype == getattr(torch, dtype) and ids.shape[1] > 4


def test_adapters_and_what_is_trained_whole_learn_in_float32(command):
    trainer = sft.make_trainer(sft.parse(command(use_peft=True, dtype="bfloat16", bf16=True)))
    learning = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in learning.values()} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} >= {torch.bfloat16}
    assert not any("vision_tower" in name for name in learning)
    for part in ("q_proj", "down_proj", "multi_modal_projector", "granularity_controller"):
        assert any(part in name for name in learning)


QUANTISED = {"use_peft": True, "lora_r": 4, "dtype": "bfloat16", "bf16": True}
no_gpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
needs_bitsandbytes = pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed")


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_only_the_language_models_layers_are_quantised(command, bits):
    trainer = sft.make_trainer(sft.parse(command(**QUANTISED, **{bits: True})))
    weights = {
        name: p for name, p in trainer.model.named_parameters() if name.endswith("weight") and "norm" not in name
    }
    whole = {name for name, p in weights.items() if p.is_floating_point()}
    assert len(weights) - len(whole) == 2 * 7, "two layers of seven projections"
    assert all(".language_model.layers." in name and "lora" not in name for name in weights.keys() - whole)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert not any("vision_tower" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


@needs_bitsandbytes
def test_a_quantised_run_resumes_and_merges_into_the_whole_base(command, base, tmp_path):
    settings = QUANTISED | {"load_in_4bit": True, "use_bnb_nested_quant": True, "learning_rate": 0.01}
    sft.main(command(max_steps=2, **settings))
    sft.main(command("--resume", "--merge", **settings))
    assert newest_complete(tmp_path / "run").name == "checkpoint-4"
    merged, before = load_model(str(tmp_path / "run/model"), dtype="bfloat16"), load_model(str(base), dtype="bfloat16")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    tower = merged.model.vision_tower.state_dict()
    assert all(torch.equal(value, tower[name]) for name, value in before.model.vision_tower.state_dict().items())
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    change = (merged.get_parameter(name) - before.get_parameter(name)).float()
    assert torch.linalg.matrix_rank(change, rtol=0.1) <= 4 and change.any(), (
        "the whole base with the adapter of rank 4"
    )


def test_quantisation_without_bitsandbytes_names_the_package(command, monkeypatch):
    monkeypatch.setattr(sft, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(SystemExit, match="need the package bitsandbytes: pip install bitsandbytes"):
        sft.main(command(load_in_4bit=True, **QUANTISED))


def test_the_last_blocks_of_the_tower_train_at_their_own_rate(command, base, tmp_path):
    blocks = {"unfreeze_vision_blocks": 1, "lr_scheduler_type": "constant"}
    trainer = sft.make_trainer(sft.parse(command(vision_learning_rate=1e-5, weight_decay=0.1, **blocks)))
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    rates = {names[p]: group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == rates.keys()
    tower = {name for name in rates if "vision_tower" in name}
    assert tower and all(".layer.1." in name for name in tower)
    assert {rates[name] for name in tower} == {1e-5} and {rates[name] for name in rates.keys() - tower} == {1e-3}
    sft.main(command(vision_learning_rate=0.0, output_dir=tmp_path / "still", **blocks))
    assert not any("vision_tower" in name for name in changed(tmp_path / "still/model", base))
    sft.main(command(**blocks))
    moved = {name for name in changed(tmp_path / "run/model", base) if "vision_tower" in name}
    assert moved <= tower and any("mlp" in name for name in moved), "saved, and loaded again"


@pytest.mark.parametrize("tower, layer, read", [("dinov2", -1, [1]), ("clip", -2, [0]), ("siglip", 1, [0])])
def test_the_last_blocks_are_those_before_the_layer_that_is_read(tower, layer, read):
    model = make_model(tower, vision_feature_layer=layer)
    set_trainable(model, "sft", 1)
    trained = {name for name, p in model.model.vision_tower.named_parameters() if p.requires_grad}
    assert {int(re.search(r"\.?layers?\.(\d+)\.", name)[1]) for name in trained} == set(read)


def test_a_convnext_has_no_blocks_to_unfreeze():
    with pytest.raises(ValueError, match="0 transformer blocks are read"):
        set_trainable(make_model("dinov3_convnext"), "sft", 1)


REPO = "jinlab/trained"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with FakeHub(tmp_path / "hub") as hub:
        monkeypatch.setattr(sft, "HfApi", lambda token: HfApi(endpoint=hub.endpoint, token=token))
        yield hub


@pytest.fixture
def publishing(command, tmp_path):
    """A command line that publishes what it trains, of a base whose licences are known."""
    settings = {"model_name_or_path": str(make_checkpoint(tmp_path / "known")), "max_steps": 2, "max_length": 1024}
    return functools.partial(command, push_to_hub=True, hub_model_id=REPO, hub_token="hf_owner", **settings)


def test_the_finished_model_is_published_with_card_and_licences_and_no_checkpoint(publishing, hub, tmp_path):
    sft.main(publishing(save_steps=1))
    files = hub.files(REPO)
    assert files["model.safetensors"] == (tmp_path / "run/model/model.safetensors").read_bytes()
    assert b"license: apache-2.0" in files["README.md"] and "LICENSE.md" in files and MANIFEST in files
    assert not any(name.startswith("checkpoint") or name.endswith((".bin", ".pt")) for name in files)
    assert files == hub.files(REPO, "v0.1.0") and b"hf_owner" not in b"".join(files.values())
    assert (
        len([commit for commit in hub.repos["model", REPO].commits.values() if commit.title.startswith("Gran")]) == 2
    )


def test_what_cannot_be_published_is_refused_before_training(publishing, hub, tmp_path):
    with pytest.raises(SystemExit, match="there is no valid token"):
        sft.main(publishing(hub_token="hf_unknown"))
    manifest = json.loads((tmp_path / "known" / MANIFEST).read_text())
    manifest["vision"] |= {"license": None, "source": "own"}
    (tmp_path / "known" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="unknown licence of the vision part"):
        sft.main(publishing())
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_failed_publishing_leaves_the_model_and_says_how_to_go_on(publishing, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "publish", lambda *arguments: (_ for _ in ()).throw(ValueError("the connection broke")))
    with pytest.raises(SystemExit, match="run/model is complete but not published: the connection broke"):
        sft.main(publishing())
    assert (tmp_path / "run/model/model.safetensors").exists()


def test_a_finished_run_merges_later(command, base, tmp_path):
    settings = {"use_peft": True, "lora_r": 4, "max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch"}
    sft.main(command(**settings))
    assert not (tmp_path / "run/model").exists()
    adapter = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    sft.main(command("--resume", "--merge", **settings))
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == adapter, "not a step more"
    assert (tmp_path / "run/model/model.safetensors").exists()


def test_a_recipe_changes_the_levels(command, base, tmp_path):
    levels = [{"name": "coarse", "stride": 2, "clusters": 2}, {"name": "fine", "stride": 1, "clusters": 4}]
    own = sft.make_trainer(sft.parse(command()))
    trainer = sft.make_trainer(sft.parse(command(granularities=levels, data=[str(tiny_json(tmp_path))])))
    model = trainer.model.model
    assert model.config.granularity_names == ["coarse", "fine"] and model.config.max_semantic_tokens == 4
    assert trainer.processing_class.num_semantic_tokens == 4
    assert model.granularity_controller.linear_2.weight.shape[0] == 2
    assert not model.multi_modal_projector.gain_offsets.any()
    kept = "multi_modal_projector.linear_1.weight"
    assert torch.equal(model.get_parameter(kept), own.model.model.get_parameter(kept))
    assert sft.parse(command("--granularities", json.dumps(levels))).sft.granularities == levels
    assert sft.parse(command("--granularities", "[]")).sft.granularities == []


def tiny_json(folder):
    make_image(0).save(folder / "0.png")
    file = folder / "rows.json"
    rows = [{"question": f"What is {number}?", "answer": "this", "image": "0.png"} for number in range(8)]
    file.write_text(json.dumps(rows))
    return file


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"stage": "pretrain"}, r"stage is 'pretrain'; choose one of \('align', 'sft'\)"),
        ({"learning_rat": 1.0}, "learning_rat"),
        ({"data": []}, "0 data sources"),
        ({"data": ["absent.jsonl"]}, "there is no file absent.jsonl"),
        ({"data": [{"path": "scenes", "splitt": "train"}]}, "expected 'path' and any of"),
        ({"data": ["scenes"]}, r"take 'train\[:N\]' or 'test\[:N\]'"),
        ({"data": [{"path": "scenes", "split": "train[:0]"}]}, "is empty"),
        ({"model_name_or_path": ...}, "model_name_or_path is missing"),
        ({"model_name_or_path": "/absent/folder"}, "/absent/folder was not found locally or on the Hub"),
        ({"granularities": []}, "set pixel_loss_weight and semantic_loss_weight to 0"),
        (
            {"granularities": [], "pixel_loss_weight": 0, "semantic_loss_weight": 0, "granularity_loss_weight": 0.1},
            "granularity_loss_weight to 0",
        ),
        ({"granularities": [{"name": "one"}]}, "missing"),
        ({"granularities": ["{name"]}, "granularities is not JSON"),
        ({"granularities": [3]}, "each is a mapping with name"),
        ({"stage": "align", "granularity_loss_weight": 0.1}, "stage align trains the projector alone"),
        ({"stage": "align", "use_peft": True}, "stage align trains the projector alone"),
        ({"merge": True}, "merge needs adapters"),
        ({"load_in_4bit": True}, "set use_peft to train adapters"),
        (
            QUANTISED | {"load_in_4bit": True, "eval_strategy": "epoch", "eval_data": ["scenes"]},
            "eval_strategy to 'no'",
        ),
        ({"unfreeze_vision_blocks": 1, "use_peft": True}, "set it to 0, or use_peft to false"),
        ({"unfreeze_vision_blocks": 1, "stage": "align"}, "stage to sft"),
        ({"unfreeze_vision_blocks": 3}, r"unfreeze_vision_blocks is 3; of this tower \(dinov3_vit\) 2 .* give 0 to 2"),
        ({"unfreeze_vision_blocks": -1}, "give 0 to 2"),
        ({"unfreeze_vision_blocks": 1, "vision_cache": "cache"}, "freeze the tower or turn the cache off"),
        ({"vision_learning_rate": 1e-5}, "set unfreeze_vision_blocks"),
        ({"push_to_hub": True}, "hub_model_id is ''; push_to_hub needs OWNER/NAME"),
        ({"push_to_hub": True, "hub_model_id": "jinlab/g", "hub_strategy": "checkpoint"}, "leave hub_strategy out"),
        ({"push_to_hub": True, "hub_model_id": "jinlab/g", "use_peft": True}, "set merge to publish the whole model"),
        ({"dtype": "bfloat16"}, "set dtype to float32"),
        ({"eval_strategy": "epoch"}, "there is no eval_data"),
        pytest.param(
            {"activation_offloading": True}, "activation_offloading keeps the activations of a GPU", marks=no_gpu
        ),
        ({"global_batch_size": 6}, "do not divide"),
        ({"pixel_loss_weight": -1.0}, "give none below 0"),
    ],
)
def test_invalid_settings_are_refused_with_the_remedy(command, settings, message):
    with pytest.raises(SystemExit, match=message) as stopped:
        sft.main(command(**settings))
    assert str(stopped.value).startswith("granulon-train: ")


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(SystemExit, match="there is no recipe tiny-gpu.*tiny-cpu"):
        sft.main(["--config", "tiny-gpu"])


def test_the_checkpoints_of_another_run_are_not_overwritten(command):
    sft.main(command())
    with pytest.raises(SystemExit, match="checkpoint-4 exists already; add --resume"):
        sft.main(command())


def test_a_model_of_another_kind_is_refused(command, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(SystemExit, match="is a model of type 'llava'.*granulon-assemble"):
        sft.main(command(model_name_or_path=str(tmp_path / "other")))


def test_unusable_rows_go_to_the_output_folder(command, tmp_path):
    file = tiny_json(tmp_path)
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([*rows, {"question": "And this?", "answer": "gone", "image": "absent.png"}]))
    sft.main(command(data=[str(file)], max_steps=1))
    (line,) = (tmp_path / "run/quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["index"] == 8


def test_the_global_batch_is_what_the_recipe_says(command, monkeypatch):
    arguments = command(global_batch_size=32)
    assert sft.parse(arguments).trainer.gradient_accumulation_steps == 8
    monkeypatch.setattr(sft.GranulonSFTConfig, "world_size", 4)
    assert sft.parse(arguments).trainer.gradient_accumulation_steps == 2


def test_scenes_of_test_are_not_those_of_train():
    train, test = (drawn_rows(DataSource("scenes", split=f"{split}[:2]")) for split in ("train", "test"))
    assert len(train) == len(test) == 14
    assert train[0]["images"][0].tobytes() != test[0]["images"][0].tobytes()
    assert {row["granularity"] for row in train} == {"coarse", "medium", "fine"}


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """The tiny recipe as a user runs it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    losses, answered = [], []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [
            "-m",
            "granulon.train.sft",
            "--config",
            "tiny-cpu",
            "--num_train_epochs",
            "1",
            "--output_dir",
            str(output),
        ]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        state = json.loads((newest_complete(output) / "trainer_state.json").read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
        answered.append([entry["eval_exact_match"] for entry in state["log_history"] if "eval_exact_match" in entry])
        assert json.loads(Path(output, "model", MANIFEST).read_text())["training"][0]["processes"] == processes
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert answered[1] == answered[0] and len(answered[0]) == 1
    assert losses[0][-1] < 0.6 * losses[0][0]
