"""Every recipe and every cluster file that ships: complete, as the paper says, and able to take a step."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import make_image, make_model, make_processor
from datasets import Dataset, Features, Image, List, Value

from granulon.hub.inference import load_model
from granulon.train import sft

RECIPES = {file.stem: sft.read_recipe(file.stem) for file in sorted(sft.RECIPES.glob("*.yaml"))}
PAPER = [name for name in RECIPES if name.startswith("sft-") and name != "sft-small"]
ALIGNMENT = [name for name in RECIPES if name.startswith("align-")]
BASELINES = [name for name in PAPER + ALIGNMENT if len(name.split("-")) > 3]
LEVELS = ("coarse", "medium", "fine")  # of the corpus that recipes replay
CLUSTER = sft.RECIPES.parent / "cluster"
TOWERS = {"clip": "clip", "siglip": "siglip", "dinov2": "dinov2"}


def write_rows(source: dict):
    """Rows where the recipe looks for its data, 8 and 200 held out, some of them without an image."""
    if "name" in source:  # a dataset of the Hub
        return write_subset(Path(source["path"]), source["name"])
    file, folder = Path(source["path"]), Path(source["image_folder"])
    folder.mkdir(parents=True, exist_ok=True)
    make_image(1).save(folder / "1.png")
    medical = {"question": "Which instrument is it?", "answer": "A grasper.", "image": "1.png", "granularity": "fine"}
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A thing."}]
    llava = {"id": "1", "image": "1.png", "conversations": turns}
    text = [{"from": "human", "value": "And then?"}, {"from": "gpt", "value": "Nothing."}]
    if file.suffix == ".jsonl":
        file.write_text("\n".join([json.dumps(medical)] * 8))
    else:
        file.write_text(json.dumps(([llava] * 7 + [{"id": "2", "conversations": text}]) * 26))


def write_subset(folder: Path, name: str):
    """A subset of The Cauldron, in a local folder of the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    row = {
        "images": [make_image(1)],
        "texts": [{"user": "What is this?", "assistant": "A thing.", "source": name}] * 2,
    }
    features = {"images": List(Image()), "texts": List({key: Value("string") for key in row["texts"][0]})}
    Dataset.from_list([row] * 8, features=Features(features)).to_parquet(folder / f"{name}.parquet")
    names = sorted(file.stem for file in folder.glob("*.parquet"))
    configs = [{"config_name": subset, "data_files": f"{subset}.parquet"} for subset in names]
    (folder / "README.md").write_text("---\n" + yaml.safe_dump({"configs": configs}) + "---\n")


def write_base(recipe: dict, name: str):
    """A small model where the recipe looks for its base: with the tower and the language model it means."""
    tower = next((tower for key, tower in TOWERS.items() if f"-{key}-" in name), "dinov3")
    levels = [{"name": level, "stride": 1, "clusters": 3 + k, "keep": 3 + k} for k, level in enumerate(LEVELS)]
    decoder = "llama" if "llama" in name else "qwen2"
    model = make_model(tower, decoder, tie_word_embeddings=True, granularities=levels)
    folder = Path(recipe["model_name_or_path"])
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_two_steps(name, tmp_path, monkeypatch):
    if RECIPES[name].get("load_in_4bit"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    monkeypatch.chdir(tmp_path)
    recipe, options = RECIPES[name], ["--max_steps", "2", "--use_cpu", "true", "--disable_tqdm", "true"]
    if recipe["model_name_or_path"] != "tiny":
        base = write_base(recipe, name)
        for source in recipe["data"] + recipe.get("eval_data", []):
            write_rows(source)
        # Fewer processes and rows, and no waiting; everything else is the recipe's.
        options += ["--dataloader_num_workers", "0", "--dataset_num_proc", "None", "--report_to", "none"]
        options += ["--per_device_train_batch_size", "2", "--global_batch_size", "4"]
        options += ["--eval_steps", "2"] if recipe.get("eval_answers") and recipe["eval_data"] else []
        if recipe.get("load_in_4bit"):  # not on a CPU
            options += ["--eval_strategy", "no"]
    sft.main(["--config", name, *options])
    output = Path(recipe["output_dir"])
    saved = load_model(str(output / "model"))
    assert (output / "adapter").exists() == recipe.get("use_peft", False)
    if recipe["model_name_or_path"] != "tiny":
        levels = {"granularities": recipe["granularities"]} if "granularities" in recipe else None
        before = load_model(str(base), overrides=levels, new_levels=True).state_dict()
        same = {key for key, value in saved.state_dict().items() if torch.equal(value.float(), before[key].float())}
        tower = {key for key in before if "vision_tower" in key}
        assert same < set(before) and (tower <= same or recipe["dtype"] == "bfloat16")
    assert (saved.config.granularities == []) == ("granularities" in recipe)


@pytest.mark.parametrize("name", PAPER)
def test_joint_tuning_has_the_papers_values(name):
    recipe = RECIPES[name]
    assert (recipe["num_train_epochs"], recipe["global_batch_size"], recipe["learning_rate"]) == (2, 128, 2e-5)
    assert recipe["bf16"] and recipe["lr_scheduler_type"] == "cosine" and recipe["stage"] == "sft"


@pytest.mark.parametrize("name", PAPER + ALIGNMENT)
def test_eight_gpus_make_the_global_batch(name):
    recipe = RECIPES[name]
    assert recipe["global_batch_size"] % (8 * recipe["per_device_train_batch_size"]) == 0


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith(("sft-small", "stream"))])
def test_a_recipe_evaluates_on_rows_that_it_does_not_train_on(name):
    recipe = RECIPES[name]
    assert recipe["eval_strategy"] in ("steps", "epoch") and recipe["eval_data"]
    for source, held_out in zip(recipe["data"], recipe["eval_data"], strict=True):
        if source["path"] == held_out["path"] != "scenes":
            assert (source["split"], held_out["split"]) == ("train[:-200]", "train[-200:]")
        else:
            assert source != held_out


@pytest.mark.parametrize("name", PAPER)
def test_joint_tuning_starts_from_its_alignment(name):
    alignment = RECIPES[name.replace("sft-", "align-")]
    assert RECIPES[name]["model_name_or_path"] == f"{alignment['output_dir']}/model"


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_differs_in_encoder_levels_and_views_alone(name):
    stage, _, text = name.split("-", 2)
    own, ours = RECIPES[name], RECIPES[f"{stage}-{text}"]
    differing = {key for key in own | ours if own.get(key) != ours.get(key)}
    of_levels = {"granularities", "pixel_loss_weight", "semantic_loss_weight"}
    of_levels |= {"granularity_loss_weight", "replay_corpus"} if stage == "sft" else set()
    assert differing - {"model_name_or_path"} == {"output_dir", *of_levels}
    assert own["granularities"] == [] and own["pixel_loss_weight"] == own["semantic_loss_weight"] == 0


def test_every_baseline_of_the_paper_is_there():
    encoders = {name.split("-")[1] for name in BASELINES}
    assert encoders == {"clip", "siglip", "dinov2", "dinov3"} and len(BASELINES) == 8


@pytest.mark.parametrize("file", sorted(CLUSTER.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_the_cluster_files(file):
    config = load_config_from_file(str(file))
    kind = {"one_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED"}[file.stem]
    assert config.distributed_type == kind and config.mixed_precision == "bf16"
    assert config.num_processes == (1 if file.stem == "one_gpu" else 8)


@pytest.fixture
def slurm(tmp_path):
    """Runs the template with stand-ins for Slurm and accelerate that write down how they were called."""
    stand_ins = {
        "srun": 'echo "$1" "$SRUN_CPUS_PER_TASK" "$HF_HOME" > srun; shift; SLURM_NODEID=1 exec "$@"',
        "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" >> requeued; fi',
        "accelerate": 'echo "$@" > called; trap -p USR1 > traps; [ -z "$ENDS" ] || mkdir -p "$ENDS"; exit "$CODE"',
    }
    (tmp_path / "bin").mkdir()
    for name, body in stand_ins.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(ends="", code="0", **variables):
        path = f"{tmp_path / 'bin'}:{Path(os.sys.executable).parent}:{os.environ['PATH']}"
        job = {"SLURM_JOB_ID": "42", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
        environment = {**os.environ, **job, "PATH": path, "ENDS": ends, "CODE": code, **variables}
        done = subprocess.run(
            ["bash", str(CLUSTER / "slurm.sh"), "--seed", "1"], env=environment, cwd=tmp_path, capture_output=True
        )
        requeued = tmp_path / "requeued"
        return done.returncode, (tmp_path / "called").read_text(), requeued.exists() and requeued.read_text()

    return run


def test_the_slurm_job_resumes_and_goes_back_to_the_queue_until_a_model_is_there(slurm, tmp_path):
    code, called, requeued = slurm(RECIPE="sft-llama3.2-3b", ENGINE="fsdp2")
    assert code == 0 and requeued == "requeue 42\n"
    assert f"--config_file {CLUSTER}/fsdp2.yaml --num_machines 2 --num_processes 16 --machine_rank 1" in called
    assert "--main_process_ip node1" in called
    assert "--config sft-llama3.2-3b --output_dir runs/sft-llama3.2-3b --resume --seed 1" in called
    assert (tmp_path / "traps").read_text() == "trap -- '' SIGUSR1\n"


def test_slurm_hands_every_node_its_cores_and_a_cache_that_all_share(slurm, tmp_path):
    slurm(SLURM_CPUS_PER_TASK="96", HF_HOME="")
    assert (tmp_path / "srun").read_text() == f"--kill-on-bad-exit=1 96 {tmp_path}/.huggingface\n"
    slurm(HF_HOME="/shared")
    assert (tmp_path / "srun").read_text() == "--kill-on-bad-exit=1  /shared\n"
    assert subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sh")]).returncode == 0


def test_a_finished_slurm_job_is_not_repeated(slurm):
    assert slurm(ends="runs/sft-qwen2.5-1.5b/model")[::2] == (0, False)


def test_a_failed_slurm_job_is_not_repeated(slurm):
    code, _, requeued = slurm(code="3")
    assert code == 3 and not requeued


def test_print_shows_the_whole_recipe_and_trains_nothing(capsys):
    with pytest.raises(SystemExit):
        sft.parse(["--config", "align-clip-qwen2.5-1.5b", "--print"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == RECIPES["align-clip-qwen2.5-1.5b"]
    assert printed["stage"] == "align" and printed["granularities"] == [] and printed["bf16"] is True


def test_a_recipe_changes_its_base_and_the_command_line_changes_the_recipe(tmp_path):
    (tmp_path / "own.yaml").write_text("base: tiny-cpu\nlearning_rate: 1e-5\nseed: 3\n")
    run = sft.parse(["--seed", "4", "--config", str(tmp_path / "own.yaml"), "--output_dir", str(tmp_path / "run")])
    assert (run.trainer.learning_rate, run.trainer.seed, run.trainer.max_length) == (1e-5, 4, 256)
    assert run.recipe == "own" and run.given["seed"] == 4 and run.given["data"][0]["path"] == "scenes"
    assert "output_dir" not in run.given and "weight_decay" in run.given and "adam_beta1" not in run.given
