"""`granulon-evaluate`: one model on some tasks, or a whole matrix of models and tasks, and the tables they make.

    granulon-evaluate --model runs/sft-qwen2.5-1.5b/model --tasks granulon_aokvqa_choice pope --output results
    granulon-evaluate --matrix matrix --output results
    accelerate launch -m granulon.evaluation.run --matrix ablations --output results

A run of the matrix (a model, how it is asked, a task) that is done is not done again: it is known by everything that
decides its figures. Whatever ends a run, the next one goes on where it was, within a run too; a run that fails does
not end the others. Under `output` lie `runs/`, each with its result, its samples and all that is needed to run it
again, and `tables/`.
"""

import gc
import json
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import HfArgumentParser

from granulon.hub.files import write_atomically

from .matrix import (
    ANSWERS,
    RESULT,
    SAMPLES,
    SCORING,
    Entry,
    Matrix,
    Run,
    Settings,
    add_entry,
    effective_overrides,
    model_identity,
    read_matrix,
    read_samples,
    run_folder,
    run_key,
    used_versions,
)
from .tables import BERTSCORE, UNDEFINED, Figure, Results, write_tables

ERROR = "error.txt"


@dataclass
class EvaluateArguments:
    output: str = field(metadata={"help": "folder of results; what it already holds is not done again"})
    model: str | None = field(default=None, metadata={"help": "a Granulon: a folder, or a Hub id"})
    tasks: list[str] = field(
        default_factory=list, metadata={"help": "tasks of ours or of lmms-eval, by name; in a matrix: only these"}
    )
    matrix: str | None = field(
        default=None, metadata={"help": "a YAML file of entries and tasks, or: matrix, ablations"}
    )
    only: list[str] = field(default_factory=list, metadata={"help": "of a matrix, only the entries of these names"})
    revision: str = field(default="main", metadata={"help": "of the model on the Hub"})
    granularity: str | None = field(default=None, metadata={"help": "level by name or index, for every question"})
    view: str = field(
        default="full",
        metadata={"help": "which image tokens are read", "choices": ["full", "pixel", "semantic", "auto"]},
    )
    overrides: str | None = field(
        default=None, metadata={"help": 'changes of the configuration, in JSON: {"controller": "random"}'}
    )
    limit: int | None = field(default=None, metadata={"help": "only so many samples of each task"})
    batch_size: int = field(default=8, metadata={"help": "prompts in one pass, on each process"})
    max_new_tokens: int = field(
        default=256, metadata={"help": "longest answer, where a task sets no limit; with --sample_rows, of all"}
    )
    seed: int = field(default=0, metadata={"help": "of everything that is drawn"})
    dtype: str = field(default="auto", metadata={"help": "of the weights: auto, float32, bfloat16, float16"})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager or flash_attention_2"})
    bertscore_model: str = field(default="roberta-large", metadata={"help": "encoder for BERTScore: folder or Hub id"})
    bertscore_layer: int = field(default=17, metadata={"help": "its hidden state; -1 is the last"})
    sample_rows: bool = field(
        default=False, metadata={"help": "a few rows made here in place of the data: checks the way, offline"}
    )
    tables_only: bool = field(default=False, metadata={"help": "write the tables of what is there"})
    judge: str | None = field(
        default=None,
        metadata={"help": "of several judges, the one whose scores the tables show, as its files are named"},
    )


@dataclass
class Outcome:
    """What became of the runs of a run, by name; and figures that could not be computed."""

    done: list[str] = field(default_factory=list)
    earlier: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    unscored: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None):
    (arguments,) = HfArgumentParser(EvaluateArguments, description=__doc__).parse_args_into_dataclasses(argv)
    PartialState(cpu=not torch.accelerator.is_available())  # else processes without a GPU do not know of each other
    try:
        _run(_matrix(arguments), arguments)
    except ValueError as error:
        sys.exit(f"granulon-evaluate: {error}")
    except KeyboardInterrupt:
        sys.exit("granulon-evaluate: stopped; the same command goes on where it was")


def _run(matrix: Matrix, arguments: EvaluateArguments):
    outcome = Outcome() if arguments.tables_only else evaluate(_wanted(matrix, arguments), arguments)
    if PartialState().is_main_process:
        tables(matrix, arguments)
        for name, reason in outcome.failed.items():
            print(f"failed: {name}: {reason}", file=sys.stderr)
    if outcome.failed:
        every = len(outcome.done) + len(outcome.earlier) + len(outcome.failed)
        sys.exit(f"granulon-evaluate: {len(outcome.failed)} of {every} runs failed; run again to retry")
    if outcome.unscored:
        print("not all figures were computed:", *outcome.unscored, sep="\n  ", file=sys.stderr)
        sys.exit(2)


def tables(matrix: Matrix, arguments: EvaluateArguments):
    """Write the tables, and say which finished runs are in none of them."""
    results = Results(Path(arguments.output), settings(arguments), arguments.judge)
    for file in write_tables(Path(arguments.output), matrix, results):
        print(f"wrote {file}")
    for names, number in results.others.items():
        print(f"{number} finished runs are in no table: they were run with another {', '.join(names)}")


def evaluate(matrix: Matrix, arguments: EvaluateArguments) -> Outcome:
    """Do what is not done of a matrix; one that fails is told of and passed over."""
    try:
        from .engine import quiet  # seconds of imports, which --help and --tables_only need not wait for
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed: pip install '.[evaluation]' in a clone of the repository, then "
            "pip install --no-deps 'lmms-eval<0.8'"
        ) from error
    quiet()
    outcome, runner, begun = Outcome(), Runner(arguments), time.monotonic()
    runs = matrix.runs
    for number, run in enumerate(runs, start=1):
        where = f"[{number}/{len(runs)}] {run.name}"
        try:
            fresh = runner.run(run)
        except Exception as error:  # whatever is wrong with this run, the others have nothing to do with it
            outcome.failed[run.name] = runner.failed(run, error)
            say(f"{where}: failed: {outcome.failed[run.name]}")
            if not isinstance(error, Unusable) and PartialState().num_processes > 1:
                raise  # the other processes wait for this one
            continue
        (outcome.done if fresh else outcome.earlier).append(run.name)
        left = (time.monotonic() - begun) / len(outcome.done) * (len(runs) - number) if outcome.done else 0
        say(f"{where}: {'done' if fresh else 'was done'}" + (f", about {_span(left)} left" if left else ""))
    outcome.unscored = runner.unscored
    return outcome


class Unusable(ValueError):
    """A run that cannot be begun, found so on all processes alike."""


class Runner:
    """Does runs one by one, and keeps the model between those of one entry."""

    def __init__(self, arguments: EvaluateArguments):
        self.arguments, self.settings = arguments, settings(arguments)
        self.output, self.state = Path(arguments.output), PartialState()
        self.entry, self.adapter = None, None
        self.unscored = []

    def run(self, run: Run) -> bool:
        """Whether there was anything to do. Raises `Unusable`, or whatever goes wrong while answering."""
        config, identity, task = self._alike(lambda: self._identify(run))
        asked = replace(run.entry, overrides=effective_overrides(run.entry))
        folder = run_folder(self.output, run, run_key(asked, identity, task, self.settings))
        if self._on_main((folder / RESULT).is_file):
            return self._on_main(lambda: self._take(run, folder))
        begun = time.monotonic()
        loaded = self._alike(lambda: self._prepare(run, config, folder))
        from .engine import answer

        answered = answer(self.adapter, loaded, self.settings.limit, self.settings.seed)
        if answered is not None:
            self._write(run, folder, identity, task, *answered, begun)
        self.state.wait_for_everyone()
        return True

    def _take(self, run: Run, folder: Path) -> bool:
        """A finished run also counts for this entry; whether its answers had to be scored again."""
        add_entry(folder, run.entry)
        result = json.loads((folder / RESULT).read_text())
        own = {name: getattr(self.settings, name) for name in SCORING}
        scored = BERTSCORE in result["metrics"] and all(result["settings"][name] == own[name] for name in SCORING)
        if scored or BERTSCORE not in {**result["metrics"], **result["not_computed"]}:
            return False
        from .engine import waiting_for_bertscore

        samples = waiting_for_bertscore(read_samples(folder))
        theirs = {name: entry["value"] for name, entry in result["metrics"].items() if name != BERTSCORE}
        told = {**result, "settings": {**result["settings"], **own}, "versions": used_versions()}
        self._score(run, folder, samples, theirs, told)
        return True

    def failed(self, run: Run, error: Exception) -> str:
        """Leave the whole story beside the results; the line that tells it."""
        if self.state.is_main_process and not isinstance(error, Unusable):
            self.output.mkdir(parents=True, exist_ok=True)
            with open(self.output / ERROR, "a", encoding="utf-8") as file:
                file.write(f"{datetime.now(UTC).isoformat()} {run.name}\n{traceback.format_exc()}\n")
        return (str(error).strip() or type(error).__name__).partition("\n")[0]

    def _identify(self, run: Run):
        from .engine import identity, task_config

        config = task_config(run.task)
        try:
            model = self._on_main(lambda: model_identity(run.entry.model, run.entry.revision))
        except ValueError as error:
            how = f"; make it with: {run.entry.made_by}" if run.entry.made_by else ""
            raise ValueError(f"{error}{how}") from error
        return config, model, identity(run.task, config)

    def _prepare(self, run: Run, config: dict, folder: Path):
        from .engine import check_scoring, make_task
        from .lmms_model import GranulonForEvaluation

        task = make_task(config, self._sample_rows(run.task, config) if self.settings.sample_rows else None)
        check_scoring(task)
        if run.entry != self.entry:
            self.entry = self.adapter = None
            gc.collect()
            torch.cuda.empty_cache()
            self.adapter = GranulonForEvaluation(
                run.entry.model,
                revision=run.entry.revision,
                granularity=run.entry.granularity,
                view=run.entry.view,
                overrides=run.entry.overrides,
                dtype=self.settings.dtype,
                attn_implementation=self.arguments.attn_implementation,
                batch_size=self.arguments.batch_size,
                max_new_tokens=self.settings.max_new_tokens,
                seed=self.settings.seed,
            )
            self.entry = run.entry
        self.adapter.answers = str(folder / ANSWERS)
        return task

    def _sample_rows(self, task: str, config: dict) -> dict:
        """Rows made here in place of the task's data, with answers as short as is asked for."""
        from .sample_rows import write_rows

        options = dict(config.get("generation_kwargs") or {})
        limits = [limit for limit in (options.get("max_new_tokens"), self.settings.max_new_tokens) if limit]
        return write_rows(task, self.output / "rows") | {
            "generation_kwargs": options | {"max_new_tokens": min(limits)}
        }

    def _write(self, run: Run, folder: Path, identity: dict, task: dict, samples: list, theirs: dict, begun: float):
        """What is told of a run once it is answered."""
        told = {
            "run": run.name,
            "entry": asdict(run.entry),
            "task": task,
            "settings": asdict(self.settings),
            "model": identity,
            "samples": len(samples),
            "seen": _seen(samples),
            "seconds": round(time.monotonic() - begun, 1),
            "processes": self.state.num_processes,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "batch_size": self.arguments.batch_size,
            "attn_implementation": self.arguments.attn_implementation,
            "versions": used_versions(),
        }
        self._score(run, folder, samples, theirs, told)
        for file in folder.glob(f"{ANSWERS}.*-of-*"):
            file.unlink()

    def _score(self, run: Run, folder: Path, samples: list, theirs: dict, told: dict):
        """Samples first, then the result, which says that the run is done."""
        from .engine import score

        options, device = self.settings, str(self.adapter.device) if self.adapter else None
        found, failed, unscored = score(
            samples, theirs, options.seed, options.bertscore_model, options.bertscore_layer, device
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(
            folder / SAMPLES, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        )
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        result = {
            **told, "metrics": found, "not_computed": failed, "unscored": unscored, "finished_at": finished
        }  # fmt: skip
        write_atomically(folder / RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        figures = [
            f"{name} {Figure(entry['value'], entry['low'], entry['high'], missing=UNDEFINED)}"
            for name, entry in found.items()
        ]
        say(f"  {run.name}: {', '.join(figures)}")
        for name, reason in failed.items():
            self.unscored.append(f"{run.name}: {name}")
            say(f"  {run.name}: {name} was not computed: {reason}; the answers are kept, run again to score them")
        for reason, number in unscored.items():
            say(f"  {run.name}: {number} of {len(samples)} samples have no score: {reason}")

    def _alike(self, action):
        """Do something on all processes; where it fails on one, it fails on all."""
        value = error = None
        try:
            value = action()
        except (ImportError, OSError, ValueError) as caught:
            error = caught
        reasons = [str(error)] if error is not None else []
        if self.state.num_processes > 1:
            reasons = gather_object(reasons)
        if reasons:
            raise Unusable(reasons[0]) from error
        return value

    def _on_main(self, action):
        """What the main process finds, or why it cannot, told to all."""
        value = reason = None
        if self.state.is_main_process:
            try:
                value = action()
            except ValueError as error:
                reason = str(error)
        if self.state.num_processes > 1:
            value, reason = broadcast_object_list([value, reason])
        if reason is not None:
            raise ValueError(reason)
        return value


def settings(arguments: EvaluateArguments) -> Settings:
    return Settings(
        limit=arguments.limit,
        seed=arguments.seed,
        dtype=arguments.dtype,
        sample_rows=arguments.sample_rows,
        bertscore_model=arguments.bertscore_model,
        bertscore_layer=None if arguments.bertscore_layer == -1 else arguments.bertscore_layer,
        max_new_tokens=arguments.max_new_tokens,
    )


def say(line: str):
    if PartialState().is_main_process:
        print(line, flush=True)


def _matrix(arguments: EvaluateArguments) -> Matrix:
    """What is asked for; raises `ValueError` where that is unclear."""
    if (arguments.model is None) == (arguments.matrix is None):
        raise ValueError("name either a --model with --tasks, or a --matrix")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"limit is {arguments.limit}; it must be at least 1")
    try:
        overrides = json.loads(arguments.overrides or "{}")
    except ValueError as error:
        raise ValueError(f"overrides is not JSON ({error}): {arguments.overrides}") from error
    if arguments.model is not None:
        if not arguments.tasks:
            raise ValueError("name --tasks for the model to do")
        entry = Entry(
            name=Path(arguments.model).name or arguments.model,
            model=arguments.model,
            revision=arguments.revision,
            granularity=arguments.granularity,
            view=arguments.view,
            overrides=overrides,
        )
        return Matrix([entry], arguments.tasks, [])
    return read_matrix(arguments.matrix)


def _wanted(matrix: Matrix, arguments: EvaluateArguments) -> Matrix:
    """The part of a matrix that is to be run; its tables are of all of it."""
    entries = [entry for entry in matrix.entries if not arguments.only or entry.name in arguments.only]
    if missing := set(arguments.only) - {entry.name for entry in entries}:
        raise ValueError(
            f"{arguments.matrix} has no entry {sorted(missing)}; it has {[entry.name for entry in matrix.entries]}"
        )
    if arguments.tasks:
        entries = [replace(entry, tasks=None) for entry in entries]
    return Matrix(entries, arguments.tasks or matrix.tasks, matrix.tables)


def _seen(samples: list[dict]) -> dict:
    """How often each level was chosen, and how many tokens were read on average."""
    levels = Counter(sample["granularity"] for sample in samples if sample.get("granularity"))
    names = ("pixel_tokens", "semantic_tokens", "input_tokens", "output_tokens")
    return {
        "levels": dict(levels),
        **{name: sum(sample.get(name) or 0 for sample in samples) / max(1, len(samples)) for name in names},
    }


def _span(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


if __name__ == "__main__":
    main()
