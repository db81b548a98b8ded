"""`granulon-evaluate`: evaluate a model on some tasks, or a matrix of models and tasks, and write the tables.

    granulon-evaluate --model runs/sft-qwen2.5-1.5b/model --tasks granulon_aokvqa_choice pope --output results
    granulon-evaluate --matrix matrix --output results
    accelerate launch -m granulon.evaluation.run --matrix ablations --output results

A run is one model, evaluated in one way on one task. Finished runs are not repeated; a run that was stopped continues
where it was; a run that fails does not end the others. The output folder holds `runs/`, each with its result, samples
and everything that is needed to repeat it, and `tables/`.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import HfArgumentParser

from modeling_granulon.image_tokens import VISUAL_VIEWS

from .matrix import Entry, Matrix, Settings, read_matrix
from .protocols import OURS, PROTOCOLS
from .tables import Results, write_tables


@dataclass
class EvaluateArguments:
    output: str = field(metadata={"help": "folder of results; finished runs in it are not repeated"})
    model: str | None = field(default=None, metadata={"help": "a Granulon checkpoint: a folder or a Hub id"})
    tasks: list[str] = field(
        default_factory=list, metadata={"help": "names of tasks, ours or lmms-eval's; with --matrix, run only these"}
    )
    matrix: str | None = field(
        default=None, metadata={"help": "a YAML file of entries and tasks, or one of: matrix, ablations"}
    )
    only: list[str] = field(default_factory=list, metadata={"help": "run only the matrix entries of these names"})
    granularity: str | None = field(default=None, metadata={"help": "a level for every question, by name or index"})
    view: str = field(default="full", metadata={"help": "image tokens that are read", "choices": list(VISUAL_VIEWS)})
    overrides: str | None = field(
        default=None, metadata={"help": 'changes of the configuration as JSON, such as {"controller": "random"}'}
    )
    protocol: str = field(
        default=OURS,
        metadata={"help": "how questions are asked and answers are scored", "choices": list(PROTOCOLS)},
    )
    limit: int | None = field(
        default=None,
        metadata={"help": "use only the first samples of each task, this many, instead of the task's own number"},
    )
    batch_size: int = field(default=8, metadata={"help": "prompts in one pass, on each process"})
    bertscore_model: str = field(
        default="roberta-large", metadata={"help": "encoder for BERTScore: a folder or a Hub id"}
    )
    sample_rows: bool = field(
        default=False, metadata={"help": "use eight generated samples instead of the data, to test a set-up offline"}
    )
    tables_only: bool = field(default=False, metadata={"help": "write the tables of finished runs and run nothing"})


def main(argv: list[str] | None = None):
    (arguments,) = HfArgumentParser(EvaluateArguments, description=__doc__).parse_args_into_dataclasses(argv)
    PartialState(cpu=not torch.accelerator.is_available())  # else CPU processes do not find each other
    try:
        _evaluate(arguments)
    except ValueError as error:
        sys.exit(f"granulon-evaluate: {error}")
    except KeyboardInterrupt:
        sys.exit("granulon-evaluate: stopped; run the same command to continue")


def _evaluate(arguments: EvaluateArguments):
    matrix, output = _matrix(arguments), Path(arguments.output)
    settings = Settings(arguments.limit, arguments.sample_rows, arguments.bertscore_model, arguments.protocol)
    failed, not_computed = {}, []
    if not arguments.tables_only:
        try:
            from .runner import evaluate  # --help and --tables_only need no lmms-eval
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{error.name} is not installed: pip install '.[evaluation]' in a clone of the repository, then "
                "pip install --no-deps 'lmms-eval<0.8'"
            ) from error
        selected = _selected(matrix, arguments)
        failed, not_computed = evaluate(selected, settings, output, arguments.batch_size)
    if PartialState().is_main_process:
        _write_tables(matrix, settings, output)
    PartialState().destroy_process_group()  # its threads would abort a process that ends before the others
    if failed:
        if PartialState().is_main_process:
            for name, reason in failed.items():
                print(f"failed: {name}: {reason}", file=sys.stderr)
        total = len(selected.runs)
        sys.exit(f"granulon-evaluate: {len(failed)} of {total} runs failed; run the same command to retry")
    if not_computed:
        print("these figures were not computed:", *not_computed, sep="\n  ", file=sys.stderr)
        sys.exit(2)


def _write_tables(matrix: Matrix, settings: Settings, output: Path):
    """Write the tables, and say which finished runs they leave out."""
    results = Results(output, settings)
    for file in write_tables(output, matrix, results):
        print(f"wrote {file}")
    for names, number in results.other_settings.items():
        print(f"{number} finished runs are in no table, since they have another {', '.join(names)}")


def _matrix(arguments: EvaluateArguments) -> Matrix:
    """The matrix of the options. Raises `ValueError` if they contradict each other."""
    if (arguments.model is None) == (arguments.matrix is None):
        raise ValueError("give either --model with --tasks, or --matrix")
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"limit is {arguments.limit}; it must be at least 1")
    try:
        overrides = json.loads(arguments.overrides or "{}")
    except ValueError as error:
        raise ValueError(f"overrides is not JSON ({error}): {arguments.overrides}") from error
    if arguments.matrix is not None:
        return read_matrix(arguments.matrix)
    if not arguments.tasks:
        raise ValueError("name the --tasks to evaluate the model on")
    entry = Entry(
        name=Path(arguments.model).name or arguments.model,
        model=arguments.model,
        granularity=arguments.granularity,
        view=arguments.view,
        overrides=overrides,
    )
    return Matrix([entry], arguments.tasks, [])


def _selected(matrix: Matrix, arguments: EvaluateArguments) -> Matrix:
    """The part of a matrix to run: the entries of --only and the tasks of --tasks."""
    entries = [entry for entry in matrix.entries if not arguments.only or entry.name in arguments.only]
    if missing := set(arguments.only) - {entry.name for entry in entries}:
        names = [entry.name for entry in matrix.entries]
        raise ValueError(f"{arguments.matrix} has no entry {sorted(missing)}; it has {names}")
    if arguments.tasks:
        entries = [replace(entry, tasks=None) for entry in entries]
    return _of_protocol(Matrix(entries, arguments.tasks or matrix.tasks, matrix.tables), arguments.protocol)


def _of_protocol(matrix: Matrix, protocol: str) -> Matrix:
    """The part of a matrix whose tasks a protocol has. Raises `ValueError` if there are none."""
    has, named = PROTOCOLS[protocol].has, dict.fromkeys(run.task for run in matrix.runs)
    left_out = [task for task in named if not has(task)]
    if left_out and PartialState().is_main_process:
        print(f"the protocol {protocol} has no {', '.join(left_out)}")
    if len(left_out) == len(named):
        raise ValueError(f"the protocol {protocol} has only the tasks {', '.join(PROTOCOLS[protocol].tasks)}")
    entries = [replace(entry, tasks=entry.tasks and tuple(filter(has, entry.tasks))) for entry in matrix.entries]
    return Matrix([entry for entry in entries if entry.tasks != ()], list(filter(has, matrix.tasks)), matrix.tables)


if __name__ == "__main__":
    main()
