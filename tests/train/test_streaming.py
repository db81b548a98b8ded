"""Streamed rows reach every process and worker once, and a training that reads them stays in step and resumes.

Run by torchrun with a folder, this file is a training of several processes on the stream of that folder.
"""

# ruff: noqa: F811
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from conftest import make_model, make_processor
from datasets import Dataset
from test_checkpoints import ENVIRONMENT
from test_data import assistant, cache, load, questions, user  # noqa: F401
from torch.utils.data import DataLoader

from granulon.train import sft
from granulon.train.arguments import GranulonSFTConfig
from granulon.train.data import load_rows
from granulon.train.data.streams import endless, unevenness
from granulon.train.trainer import GranulonTrainer


def shards(folder, *counts, suffix="jsonl"):
    """A source of that many files, with the questions 0? ... in order."""
    start = 0
    for number, count in enumerate(counts):
        rows = [{"question": f"{index}?", "answer": "so " * (index % 5 + 1)} for index in range(start, start + count)]
        if suffix == "parquet":
            Dataset.from_list(rows).to_parquet(folder / f"{number}.parquet", batch_size=1)  # rows of a row group
        else:
            (folder / f"{number}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        start += count
    return str(folder / f"*.{suffix}")


def read(load, source, processes, workers, batches):
    """The questions that each process reads in so many batches of two, split as the trainer splits them."""
    seen = []
    for process in range(processes):
        rows = endless(load(source, streaming=True), processes, workers)
        loader = DataLoader(rows, batch_size=2, num_workers=workers, collate_fn=questions)
        own = prepare_data_loader(loader, num_processes=processes, process_index=process, dispatch_batches=False)
        seen.append([question for batch in islice(own, batches) for question in batch])
    return seen


SPLITS = {
    "a file": ((24,), 2, 2),
    "a file for each worker": ((6, 6, 6, 6), 2, 2),
    "two files for each worker": ((3,) * 8, 2, 2),
    "fewer files than processes": ((12, 12), 3, 2),
    "no workers": ((6, 6, 6, 6), 2, 0),
}


@pytest.mark.parametrize("name", SPLITS)
def test_every_row_is_read_exactly_once_in_each_pass(name, load, tmp_path):
    counts, processes, workers = SPLITS[name]
    source = shards(tmp_path, *counts)
    batches = 24 // processes // 2
    for passes in (1, 2):
        seen = read(load, source, processes, workers, passes * batches)
        assert Counter(question for own in seen for question in own) == {f"{index}?": passes for index in range(24)}


def test_parquet_files_that_do_not_divide_are_divided_further(load, tmp_path):
    source = shards(tmp_path, 8, 8, 8, suffix="parquet")
    seen = read(load, source, processes=2, workers=2, batches=6)
    assert Counter(question for own in seen for question in own) == {f"{index}?": 1 for index in range(24)}


def test_shards_that_cannot_be_divided_evenly_are_reported(load, tmp_path, caplog):
    source = shards(tmp_path, 8, 8, 8)
    endless(load(source, streaming=True), processes=3, workers=2)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        endless(load(source, streaming=True), processes=2, workers=2)
    assert "3 shards for 2 processes with 2 workers each: the rows of some pass 2 times as often" in caplog.text


@pytest.mark.parametrize(
    "shards, processes, workers, ratio",
    [(1, 8, 8, 1), (64, 8, 8, 1), (3, 1, 2, 2), (22, 8, 0, 1.5), (22, 8, 2, 4 / 2), (5, 8, 2, 1.5), (8, 8, 4, 1)],
)
def test_unevenness_is_the_ratio_of_passes(shards, processes, workers, ratio):
    assert unevenness(shards, processes, workers) == pytest.approx(ratio)


def make_trainer(folder, rows, **arguments):
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 4, "learning_rate": 1e-3, "logging_steps": 1,
        "report_to": "none", "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    args = GranulonSFTConfig(output_dir=str(folder), **settings | arguments)
    trainer = GranulonTrainer(make_model(), args, make_processor(), train_dataset=rows)
    collate, trainer.batches = trainer.data_collator, []
    trainer.data_collator = lambda rows: trainer.batches.append(questions(rows)) or collate(rows)
    return trainer


def test_a_resumed_training_reads_the_rows_that_an_uninterrupted_one_reads(load, tmp_path):
    """A pass is 2.5 batches: the checkpoint is in the fourth one."""
    source = shards(tmp_path, 5)
    whole = make_trainer(tmp_path / "run", load(source, streaming=True), gradient_accumulation_steps=2)
    assert whole.train().global_step == 6
    assert all(len(batch) == 2 for batch in whole.batches)
    passes = [question for batch in whole.batches for question in batch]
    assert all(len(set(passes[start : start + 5])) == 5 for start in range(0, 20, 5))
    resumed = make_trainer(tmp_path / "run", load(source, streaming=True), gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    assert resumed.batches == whole.batches  # the eight before the checkpoint are read and left aside
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name]), name


def test_two_processes_stay_in_step_though_their_shards_differ_in_size(tmp_path):
    shards(tmp_path, 3, 4, 9, 8)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    (steps, first), (others, second) = json.loads((tmp_path / "result.json").read_text())
    assert steps == others == 6 and first == second


def test_the_rows_of_a_stream_set_the_steps():
    options = ["--config", "tiny-cpu", "--streaming", "true", "--stream_rows", "100"]
    assert sft.parse(options).trainer.max_steps == 13  # 2 epochs of 100 rows, 16 per step
    assert sft.parse([*options, "--max_steps", "3"]).trainer.max_steps == 3


@pytest.mark.parametrize(
    "options, message",
    [
        (["--streaming", "true"], "give stream_rows, the rows of an epoch, or max_steps"),
        (["--stream_rows", "9"], "stream_rows is 9; it is the number of rows of a stream: set streaming"),
        (["--streaming", "true", "--stream_rows", "0"], "stream_rows is 0; it is the number of rows of a stream"),
    ],
)
def test_a_stream_without_length_says_what_to_give(options, message):
    with pytest.raises(ValueError, match=message):
        sft.parse(["--config", "tiny-cpu", *options])


def train(folder):
    source, quarantine = str(folder / "*.jsonl"), folder / "bad.jsonl"
    rows = load_rows([source], make_processor(), seed=0, quarantine=quarantine, streaming=True)
    torch.manual_seed(0)
    arguments = {"gradient_accumulation_steps": 2, "dataloader_num_workers": 2, "save_strategy": "no"}
    trainer = make_trainer(folder / "run", rows, **arguments)
    trainer.train()
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in trainer.model.state_dict().values())).hexdigest()
    results = [None, None]
    torch.distributed.all_gather_object(results, (trainer.state.global_step, digest))
    (folder / "result.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    train(Path(sys.argv[1]))
