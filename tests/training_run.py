"""Small trainings in processes of their own, which may be killed: what test_checkpoints and test_distributed run.

    python training_run.py '{"folder": ..., "runs": [{"name": ..., "steps": ..., ...}, ...]}'

Every run is a fork of a process that has only imported: as good as a fresh one, and there in no time. Under torchrun
there is one run, and no fork. Runs of one name share their output folder; their losses gather in NAME/losses.jsonl.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import make_image, make_model, make_processor
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from granulon.train import checkpoints
from granulon.train.arguments import GranulonSFTConfig
from granulon.train.trainer import GranulonTrainer
from modeling_granulon import GranulonForConditionalGeneration, GranulonProcessor


@dataclass
class Run:
    """One training; with `kill_at` or `kill_after` one that does not end."""

    name: str
    steps: int = 6
    batch: int = 2
    accumulate: int = 2
    save_steps: int = 2
    resume: bool = False
    kill_at: int | None = None  # the how-maniest write of the saves, counted from 0
    torn: bool = False  # and the file written before it stays half
    kill_after: float | None = None  # seconds
    kill_in_step: int | None = None  # after its gradients, before its save
    infinite_in_step: int | None = None  # whose gradient is not finite
    engine: str = "ddp"  # file in train/cluster/ with which several processes are launched
    finish: bool = False  # evaluate and save the model when training has ended
    rows: str = "mixed"  # or "text": no row has an image
    count: int = 10  # of rows: an epoch ends within the accumulation of a step
    arguments: dict = field(default_factory=dict)  # further ones of the trainer's configuration


def make_base(folder: Path, dropout: float, tower: str = "dinov3", tied: bool = True):
    """A small checkpoint as `granulon-assemble` leaves it, with a manifest and licences."""
    model = make_model(tower, tie_word_embeddings=tied)
    model.config.text_config.attention_dropout = dropout
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    (folder / "granulon_manifest.json").write_text('{"image_token": "<|image_pad|>"}\n')
    (folder / "licences" / "vision").mkdir(parents=True)
    (folder / "licences" / "vision" / "LICENSE.md").write_text("the tower's licence\n")


def make_rows(kind: str, count: int) -> Dataset:
    """Answers of uneven length; of every six rows the third and fourth have an image, and here and there another."""
    rows = []
    for number in range(count):
        image = [make_image(number)] if kind == "mixed" and (number // 2 % 3 == 1 or number % 7 == 6) else []
        question = [{"type": "image"}] * len(image) + [{"type": "text", "text": f"How many are {number}?"}]
        answer = [{"type": "text", "text": "so many " * (1 + number % 5)}]
        prompt, completion = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        rows.append({"prompt": [prompt], "completion": [completion], "images": image})
    return Dataset.from_list(rows)


class Losses(TrainerCallback):
    """Every log line, at once, where no kill can take it back."""

    def __init__(self, file: Path):
        self.file = file

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "loss" in logs:
            with self.file.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class Kill(TrainerCallback):
    """Ends the process in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Writes:
    """Counts what the process writes below a folder, and kills the process at a given write."""

    EVENTS = {"os.mkdir", "os.rename", "shutil.rmtree"}
    OF_RMTREE = {"os.remove", "os.rmdir"}  # it names what it removes by an open folder

    def __init__(self, folder: Path, kill_at: int | None, torn: bool):
        self.folder, self.kill_at, self.torn = str(folder), kill_at, torn
        self.count, self.last = 0, None
        sys.addaudithook(self._audit)
        # These write files from C++ and Rust, where no event is raised.
        torch.save = self._watched(torch.save)
        transformers.modeling_utils.safe_save_file = self._watched(transformers.modeling_utils.safe_save_file)

    def _audit(self, event, arguments):
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._write(path)
        elif event in self.EVENTS:
            self._write(arguments[0], is_file=False)
        elif event in self.OF_RMTREE and arguments[1] != -1 and self.count:
            self._count(None)

    def _watched(self, save):
        def watched(what, path, *args, **kwargs):
            self._write(path)
            save(what, path, *args, **kwargs)

        return watched

    def _write(self, path, is_file=True):
        if isinstance(path, (str, os.PathLike)) and str(path).startswith(f"{self.folder}/checkpoint-"):
            self._count(str(path) if is_file else None)

    def _count(self, file):
        if self.count == self.kill_at:
            if self.torn and self.last and os.path.isfile(self.last):
                os.truncate(self.last, os.path.getsize(self.last) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        self.count, self.last = self.count + 1, file


def train(folder: Path, run: Run) -> dict:
    """The run, to its end; by each of the processes, if accelerate or torchrun started several."""
    output, deepspeed = folder / run.name, bool(os.environ.get("ACCELERATE_USE_DEEPSPEED"))
    output.mkdir(parents=True, exist_ok=True)
    if os.environ.get("ACCELERATE_USE_FSDP"):
        allow_fsdp_on_cpu()
    writes = Writes(output, run.kill_at, run.torn)
    model = GranulonForConditionalGeneration.from_pretrained(folder / "base")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    values = {
        "output_dir": str(output),
        "max_steps": run.steps,
        "per_device_train_batch_size": run.batch,
        "per_device_eval_batch_size": run.batch,
        "gradient_accumulation_steps": run.accumulate,
        "save_steps": run.save_steps,
        "save_total_limit": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_length": None,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": not deepspeed,
        "ddp_backend": "gloo" if deepspeed else None,
        "gradient_checkpointing": False,
        **run.arguments,
    }
    trainer = GranulonTrainer(
        model,
        GranulonSFTConfig(**values),
        GranulonProcessor.from_pretrained(folder / "base"),
        train_dataset=make_rows(run.rows, run.count),
        callbacks=[Losses(output / "losses.jsonl"), *([Kill(run.kill_in_step)] if run.kill_in_step else [])],
    )
    if run.infinite_in_step:
        weight = trainer.granulon.multi_modal_projector.linear_2.weight
        weight.register_hook(
            lambda gradient: gradient * float("inf" if trainer.state.global_step + 1 == run.infinite_in_step else 1)
        )
    checkpoint = checkpoints.resume_point(output) if run.resume else None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    evaluated = {}
    if run.finish:
        evaluated = trainer.evaluate(make_rows(run.rows, 12))
        trainer.save_model(str(output / "model"))
    after = {name: whole(value) for name, value in trainer.model.state_dict().items()}
    return {
        "resumed": checkpoint and checkpoint.name,
        "writes": writes.count,
        "hash": weights_hash(after),
        "eval_loss": evaluated.get("eval_loss_task"),
        "unchanged": [name for name, value in after.items() if torch.equal(value, before[name])],
        "wrapped": sorted({type(part).__name__ for part in trainer.model.modules() if isinstance(part, FSDPModule)}),
        "tied": trainer.model.lm_head.weight is trainer.model.get_input_embeddings().weight,
    }


def allow_fsdp_on_cpu():
    """accelerate turns FSDP on for accelerators only; the rest of it runs on a CPU as well."""
    start = AcceleratorState.__init__

    def start_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = start_with_fsdp


def whole(value: torch.Tensor) -> torch.Tensor:
    """A weight gathered from all processes, where it was sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def weights_hash(weights: dict) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def in_fork(folder: Path, run: Run) -> dict:
    """What became of the run in a child of this process: its result, or the signal that ended it."""
    result, start = folder / f"{run.name}.json", time.monotonic()
    result.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            result.write_text(json.dumps(train(folder, run)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if run.kill_after is not None:
        threading.Timer(run.kill_after, os.kill, (child, signal.SIGKILL)).start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {
        "exit": status,
        "seconds": time.monotonic() - start,
        **(json.loads(result.read_text()) if not status else {}),
    }


def main():
    task = json.loads(sys.argv[1])
    folder = Path(task["folder"])
    if "WORLD_SIZE" in os.environ:
        result = train(folder, Run(**task["runs"][0]))
        if os.environ["RANK"] == "0":
            print("RESULT " + json.dumps(result), flush=True)
        return
    for run in task["runs"]:
        print("RESULT " + json.dumps(in_fork(folder, Run(**run))), flush=True)


if __name__ == "__main__":
    main()
