"""Does the runs of a matrix one after the other, on all processes, and writes their results."""

import gc
import json
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from granulon.hub.files import rank_files, write_atomically, write_jsonl
from granulon.hub.text import first_line, with_interval

from . import engine
from .lmms_model import GranulonForEvaluation
from .matrix import (
    ANSWERS,
    RESULT,
    SAMPLES,
    Matrix,
    Run,
    Settings,
    add_entry,
    effective_overrides,
    model_identity,
    read_samples,
    run_folder,
    run_key,
    used_versions,
)
from .metrics import BERTSCORE
from .sample_rows import write_rows
from .tables import UNDEFINED

ERROR_LOG = "error.txt"


class CannotStart(ValueError):
    """A run that cannot start, known on all processes."""


def evaluate(matrix: Matrix, settings: Settings, output: Path, batch_size: int) -> tuple[dict[str, str], list[str]]:
    """
    Do the runs of a matrix that are not finished; a run that fails does not end the others.

    Args:
        settings, output, batch_size: as in `Runner`.

    Returns:
        the failed runs, by name: the reason; and the names of figures that could not be computed.
    """
    engine.reduce_logging()
    runner, failed, done, start = Runner(settings, output, batch_size), {}, 0, time.monotonic()
    for number, run in enumerate(matrix.runs, start=1):
        progress = f"[{number}/{len(matrix.runs)}] {run.name}"
        try:
            made = runner.run(run)
        except Exception as error:  # the other runs do not depend on this one
            failed[run.name] = first_line(error)
            print_once(f"{progress}: failed: {first_line(error)}")
            if not isinstance(error, CannotStart):
                runner.log_error(run)
                if PartialState().num_processes > 1:
                    raise  # the other processes wait for this one
            continue
        done += made
        left = (time.monotonic() - start) / max(1, done) * (len(matrix.runs) - number)
        left = f", about {tqdm.format_interval(left)} left" if done and left else ""
        print_once(f"{progress}: {'done' if made else 'finished before'}{left}")
    return failed, runner.not_computed


class Runner:
    """
    Does single runs; the model stays loaded while the entry is the same.

    Args:
        settings: of all runs.
        output: folder of results.
        batch_size: prompts in one pass, on each process.
    """

    def __init__(self, settings: Settings, output: Path, batch_size: int):
        self.settings, self.output, self.batch_size = settings, output, batch_size
        self.entry, self.model = None, None
        self.not_computed = []

    def run(self, run: Run) -> bool:
        """Do a run; False if it was finished before. Raises `CannotStart`, or any error while answering."""
        config, model, task = fail_together(lambda: self._identify(run))
        entry = replace(run.entry, overrides=effective_overrides(run.entry))
        folder = run_folder(self.output, run, run_key(entry, model, task, self.settings))
        limit = self.settings.limit or engine.own_limit(config)
        if on_main_rank((folder / RESULT).is_file):
            return on_main_rank(lambda: self._reuse(run, folder))
        start = time.monotonic()
        loaded = fail_together(lambda: self._prepare(run, config, folder))
        answers = engine.answer(self.model, loaded, limit)
        if answers is not None:
            samples, aggregated = answers
            description = {
                "run": run.name,
                "entry": asdict(run.entry),
                "task": task,
                "model": model,
                "data": {
                    "path": config.get("dataset_path"),
                    "revision": (config.get("dataset_kwargs") or {}).get("revision"),
                },
                "limit": limit,
                "samples": len(samples),
                "seen": _seen(samples),
                "seconds": round(time.monotonic() - start, 1),
                "processes": PartialState().num_processes,
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "batch_size": self.batch_size,
            }
            self._score_and_write(run, folder, samples, aggregated, description)
            for file in rank_files(folder / ANSWERS):
                file.unlink()
        PartialState().wait_for_everyone()
        return True

    def log_error(self, run: Run):
        """Append the traceback of a failed run to error.txt."""
        if PartialState().is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            with open(self.output / ERROR_LOG, "a", encoding="utf-8") as file:
                file.write(f"{datetime.now(UTC).isoformat()} {run.name}\n{traceback.format_exc()}\n")

    def _identify(self, run: Run) -> tuple[dict, dict, dict]:
        """The configuration of the task, and the identities of model and task."""
        config = engine.task_config(run.task, self.settings.protocol)
        if not self.settings.sample_rows:
            asked = (config.get("dataset_kwargs") or {}).get("revision")
            commit = on_main_rank(lambda: engine.data_commit(config.get("dataset_path"), asked))
            config = engine.with_commit(config, commit)
        try:
            model = on_main_rank(lambda: model_identity(run.entry.model, run.entry.revision))
        except ValueError as error:
            command = f"; make it with: {run.entry.made_by}" if run.entry.made_by else ""
            raise ValueError(f"{error}{command}") from error
        return config, model, engine.task_identity(run.task, config)

    def _prepare(self, run: Run, config: dict, folder: Path):
        """The task with its data, after loading the model."""
        task = engine.make_task(
            config, write_rows(run.task, config, self.output) if self.settings.sample_rows else None
        )
        engine.check_scoring(task)
        if run.entry != self.entry:
            self.entry = self.model = None
            gc.collect()
            torch.cuda.empty_cache()
            self.model = GranulonForEvaluation(
                run.entry.model,
                revision=run.entry.revision,
                granularity=run.entry.granularity,
                view=run.entry.view,
                overrides=run.entry.overrides,
                batch_size=self.batch_size,
            )
            self.entry = run.entry
        self.model.answers = str(folder / ANSWERS)
        return task

    def _reuse(self, run: Run, folder: Path) -> bool:
        """Use a finished run for this entry; True if its answers had to be scored with another BERTScore model."""
        add_entry(folder, run.entry)
        result = json.loads((folder / RESULT).read_text())
        metrics, not_computed = result["metrics"], result["not_computed"]
        same = result["settings"]["bertscore_model"] == self.settings.bertscore_model
        if BERTSCORE not in not_computed and (same or BERTSCORE not in metrics):
            return False
        aggregated = {name: figure["value"] for name, figure in metrics.items() if name != BERTSCORE}
        self._score_and_write(run, folder, read_samples(folder), aggregated, result)
        return True

    def _score_and_write(self, run: Run, folder: Path, samples: list, aggregated: dict, description: dict):
        """Write the samples, then the result, whose existence marks the run as finished."""
        device = str(self.model.device) if self.model else None
        metrics, not_computed, unscored = engine.score(samples, aggregated, self.settings.bertscore_model, device)
        folder.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / SAMPLES, samples)
        result = description | {
            "settings": asdict(self.settings),
            "versions": used_versions(),
            "metrics": metrics,
            "not_computed": not_computed,
            "unscored": unscored,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_atomically(folder / RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        shown = [
            f"{name} {with_interval(figure['value'], figure['low'], figure['high']) or UNDEFINED}"
            for name, figure in metrics.items()
        ]
        print_once(f"  {run.name}: {', '.join(shown)}")
        for name, reason in not_computed.items():
            self.not_computed.append(f"{run.name}: {name}")
            print_once(f"  {run.name}: {name} was not computed: {reason}; run again to score the same answers")
        for reason, number in unscored.items():
            print_once(f"  {run.name}: {number} of {len(samples)} samples have no score: {reason}")


def fail_together(action: Callable):
    """Call a function on all processes; if it fails on one, raise `CannotStart` on all."""
    value = error = None
    try:
        value = action()
    except (ImportError, OSError, ValueError) as caught:
        error = caught
    reasons = [str(error)] if error is not None else []
    if PartialState().num_processes > 1:
        reasons = gather_object(reasons)
    if reasons:
        raise CannotStart(reasons[0]) from error
    return value


def on_main_rank(action: Callable):
    """Call a function on the main process; all processes get its value, or its `ValueError`."""
    value = reason = None
    if PartialState().is_main_process:
        try:
            value = action()
        except ValueError as error:
            reason = str(error)
    if PartialState().num_processes > 1:
        value, reason = broadcast_object_list([value, reason])
    if reason is not None:
        raise ValueError(reason)
    return value


def print_once(line: str):
    """Print on the main process only."""
    if PartialState().is_main_process:
        print(line, flush=True)


def _seen(samples: list[dict]) -> dict:
    """How often each level was chosen, and the mean numbers of tokens."""
    levels = Counter(sample["granularity"] for sample in samples if sample.get("granularity"))
    names = ("pixel_tokens", "semantic_tokens", "input_tokens", "output_tokens")
    means = {name: sum(sample.get(name) or 0 for sample in samples) / max(1, len(samples)) for name in names}
    return {"levels": dict(levels), **means}
