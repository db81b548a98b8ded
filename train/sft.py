"""`granulon-train`: alignment and joint tuning by recipe.

    granulon-train --config tiny-cpu
    accelerate launch -m granulon.train.sft --config recipe.yaml --learning_rate 1e-5

A recipe is a YAML file that says everything; options on the command line override it. The bare name of a recipe that
ships with the package is found there. What is trained in which stage is in stages.py.

Under `output_dir` lie the checkpoints, the rows that could not be used (quarantine.jsonl) and, when training has
ended, the model in `model/`, or with adapters `adapter/` and, with `merge`, `model/`. Neither appears before it is
complete.
"""

import json
import logging
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, set_seed
from transformers.trainer import TRAINING_ARGS_NAME
from trl import ModelConfig, TrlParser

from granulon.hub.tiny import assemble_tiny
from granulon.train.controller.replay import QuestionReplay, load_corpus
from granulon.train.data import DataSource, load_rows

from .arguments import GranulonSFTConfig
from .checkpoints import newest_complete, record_training, resume_point
from .stages import STAGES, load_model, load_processor, lora_config, merge, parameter_counts, set_trainable
from .trainer import GranulonTrainer

RECIPES = Path(__file__).parent / "recipes"
TINY = "tiny"  # a model's name: the small random one of `granulon-assemble --tiny`
MODEL, ADAPTER = "model", "adapter"  # folders of what training leaves, under output_dir
UNTOLD = ("output_dir", "logging_dir", "hub_token", "push_to_hub_token", "resume", "merge")  # not for the manifest

logger = logging.getLogger(__name__)


@dataclass
class SFTArguments:
    """What a recipe says beyond the settings of the trainer and of the model."""

    stage: str = field(
        default="sft",
        metadata={"help": f"one of {', '.join(STAGES)}: which parts of the model learn"},
    )
    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "files, folders, Hub datasets or 'scenes'; in a recipe also mappings of DataSource's arguments"
        },
    )
    eval_data: list[str] = field(default_factory=list, metadata={"help": "as data, for evaluation"})
    streaming: bool = field(default=False, metadata={"help": "read the data as training goes"})
    max_bad_share: float = field(
        default=0.01, metadata={"help": "share of a source's rows that may be unusable before training stops"}
    )
    granularities: list[str] | None = field(
        default=None,
        metadata={"help": "levels in place of the checkpoint's own: a list in a recipe, or in JSON; [] for none"},
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "rows per step over all processes; gradient_accumulation_steps follows from it"},
    )
    replay_corpus: str | None = field(
        default=None,
        metadata={
            "help": "granularity corpus (JSONL file, folder, or 'seed') whose questions the controller keeps learning"
        },
    )
    merge: bool = field(default=False, metadata={"help": "with adapters: also save the model with them merged"})
    resume: bool = field(default=False, metadata={"help": "go on from the newest complete checkpoint, if any"})

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"stage is {self.stage!r}; choose one of {tuple(STAGES)}")
        self.data = [DataSource.of(entry) for entry in self.data]
        self.eval_data = [DataSource.of(entry) for entry in self.eval_data]
        if self.granularities is not None:
            self.granularities = [level for entry in self.granularities for level in _levels(entry)]


@dataclass
class Run:
    """Everything that was asked for, and the words it was asked in (for the manifest)."""

    sft: SFTArguments
    trainer: GranulonSFTConfig
    model: ModelConfig
    recipe: str | None
    given: dict

    @property
    def output(self) -> Path:
        return Path(self.trainer.output_dir)


def main(argv: list[str] | None = None, callbacks: list[TrainerCallback] = ()):
    """Train as the command line says; `callbacks` are handed to the trainer."""
    stop = StopOnSignal()
    try:
        run = parse(sys.argv[1:] if argv is None else argv)
        trainer = make_trainer(run, [stop, *callbacks])
        checkpoint = resume_point(run.output) if run.sft.resume else None
    except (OSError, ValueError) as error:
        sys.exit(f"granulon-train: {error}")
    say(described(trainer, run))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < trainer.state.max_steps and stop.asked:
        say(f"stopped by a signal after step {trainer.state.global_step}; go on with --resume")
        return
    for folder in save(trainer, run):
        say(f"wrote {folder}")


def parse(argv: list[str]) -> Run:
    """
    A run from a command line.

    Raises:
        ValueError: a recipe that does not exist or has unknown keys, settings that contradict each other.
        SystemExit: an option that does not exist.
    """
    argv, recipe, keys = _with_recipe_path(list(argv))
    parser = TrlParser((SFTArguments, GranulonSFTConfig, ModelConfig), description=__doc__)
    sft, trainer, model = parser.parse_args_and_config(argv)
    keys |= {re.sub("^no_", "", option) for option in _options(argv)}
    given = {
        key: value
        for part in (sft, trainer, model)
        for key, value in vars(part).items()
        if key in keys and key not in UNTOLD
    }
    run = Run(sft, trainer, model, recipe, json.loads(json.dumps(given, default=_told)))
    _check(run)
    if sft.global_batch_size is not None:
        trainer.gradient_accumulation_steps = _accumulation(run)
    return run


def make_trainer(run: Run, callbacks: list[TrainerCallback] = ()) -> GranulonTrainer:
    """Model, processor, rows and trainer of a run; raises `ValueError` or `OSError` where one cannot be made."""
    _set_up_logging(run.trainer)
    set_seed(run.trainer.seed)
    name = _fetched_name(run)
    model = _model(run, name)
    processor = load_processor(name, model.config, revision=run.model.model_revision)
    rows = _rows(run, run.sft.data, "quarantine.jsonl", processor, model)
    eval_rows = None
    if run.sft.eval_data:
        eval_rows = _rows(run, run.sft.eval_data, "quarantine_eval.jsonl", processor, model)
    set_trainable(model, run.sft.stage)
    replay = None
    if run.sft.replay_corpus is not None:
        replay = QuestionReplay(load_corpus(run.sft.replay_corpus), processor, model.config.granularity_names)
    return GranulonTrainer(
        model=model,
        args=run.trainer,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        replay=replay,
        peft_config=lora_config(model, run.model) if run.model.use_peft else None,
        callbacks=list(callbacks),
    )


def save(trainer: GranulonTrainer, run: Run) -> list[Path]:
    """Write the trained model with processor, code, licences and manifest, by all processes; the folders written."""
    folder = run.output / (ADAPTER if run.model.use_peft else MODEL)
    with _whole_or_absent(folder) as draft:
        trainer.save_model(str(draft))
        if PartialState().is_main_process:
            _add_documents(trainer, run, draft)
    if not (run.model.use_peft and run.sft.merge):
        return [folder]
    merged = run.output / MODEL
    with _whole_or_absent(merged) as draft:
        if PartialState().is_main_process:
            model = merge(_model(run, _fetched_name(run)), folder)
            model.save_pretrained(draft)
            trainer.processing_class.save_pretrained(draft)
            _add_documents(trainer, run, draft)
    return [folder, merged]


class StopOnSignal(TrainerCallback):
    """SIGTERM or SIGUSR1 to any process: all of them finish the step, save a checkpoint and stop.

    transformers' `enable_jit_checkpoint` saves in each process when its own signal arrives, which may be at different
    steps, and in the middle of accumulation.
    """

    def __init__(self):
        self.received = self.asked = False
        self.previous = {signal.SIGUSR1: signal.signal(signal.SIGUSR1, self._note)}

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)

    def on_step_end(self, args, state, control, **kwargs):
        if reduce(torch.tensor(float(self.received), device=args.device), reduction="sum") > 0:
            self.asked = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.asked:  # the epoch is not over: no second save, no evaluation while the clock runs
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.received = True


def described(trainer: GranulonTrainer, run: Run) -> str:
    """What will be trained, in a line."""
    every, learning = parameter_counts(trainer.model)
    args = trainer.args
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = f"{len(trainer.train_dataset):,} rows" if hasattr(trainer.train_dataset, "__len__") else "streamed rows"
    return f"stage {run.sft.stage}: {learning:,} of {every:,} parameters learn from {rows}, {batch} a step"


def say(line: str):
    if PartialState().is_main_process:
        print(line, flush=True)


def _with_recipe_path(argv: list[str]) -> tuple[list[str], str | None, set[str]]:
    """The command line with the recipe's path in place of its name, the recipe's name, and its keys."""
    argv = [part for entry in argv for part in (entry.split("=", 1) if entry.startswith("--config=") else [entry])]
    if "--config" not in argv:
        return argv, None, set()
    if argv[-1] == "--config":
        raise ValueError("--config names no recipe; give a YAML file or the name of a recipe")
    place = argv.index("--config") + 1
    path = Path(argv[place])
    if not path.is_file():
        path = RECIPES / f"{argv[place]}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
        raise ValueError(f"there is no recipe {argv[place]}; give a YAML file or one of {', '.join(known)}")
    argv[place] = str(path)
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    return argv, path.stem, set(content if isinstance(content, dict) else ())


def _levels(entry: str | dict) -> list[dict]:
    """The levels of an entry: itself, or what it says in JSON."""
    try:
        levels = json.loads(entry) if isinstance(entry, str) else entry
    except ValueError as error:
        raise ValueError(f"granularities is not JSON ({error}): {entry}") from error
    levels = levels if isinstance(levels, list) else [levels]
    if wrong := [level for level in levels if not isinstance(level, dict)]:
        raise ValueError(f"granularities holds {wrong}; a granularity is a dict with name, stride, clusters and keep")
    return levels


def _told(source: DataSource) -> dict:
    return {key: value for key, value in vars(source).items() if value is not None}


def _options(argv: list[str]) -> Iterator[str]:
    return (part[2:].partition("=")[0].replace("-", "_") for part in argv if part.startswith("--"))


def _check(run: Run):
    if not run.model.model_name_or_path:
        raise ValueError("model_name_or_path is missing; name an assembled checkpoint, or 'tiny'")
    if run.model.load_in_4bit or run.model.load_in_8bit:
        raise ValueError("quantised loading is not supported; use dtype: bfloat16 with adapters")
    if run.model.dtype != "float32" and not run.model.use_peft:
        raise ValueError(
            f"dtype is {run.model.dtype}, in which most steps are too small to change a weight; set dtype to float32 "
            "(bf16 makes the arithmetic bfloat16), or train adapters with use_peft"
        )
    if run.sft.merge and not run.model.use_peft:
        raise ValueError("merge needs adapters; set use_peft, or leave merge out")
    if run.sft.replay_corpus is not None and not run.trainer.granularity_loss_weight:
        raise ValueError("replay_corpus trains the controller; give granularity_loss_weight a value above 0")
    if run.sft.stage == "align" and (run.model.use_peft or run.trainer.granularity_loss_weight > 0):
        raise ValueError(
            "stage align trains the projector alone; set use_peft to false and granularity_loss_weight to 0"
        )
    if run.trainer.eval_strategy != "no" and not run.sft.eval_data:
        raise ValueError(
            f"eval_strategy is {run.trainer.eval_strategy} without eval_data; name some, or set it to 'no'"
        )
    found = newest_complete(run.output)
    if found is not None and not run.sft.resume:
        raise ValueError(f"{found} is there already; add --resume to go on from it, or choose another output_dir")


def _accumulation(run: Run) -> int:
    """Batches per step that make the global batch."""
    at_once = run.trainer.per_device_train_batch_size * run.trainer.world_size
    if run.sft.global_batch_size % at_once:
        raise ValueError(
            f"global_batch_size is {run.sft.global_batch_size}, which {run.trainer.world_size} processes with "
            f"per_device_train_batch_size {run.trainer.per_device_train_batch_size} do not divide; change either"
        )
    return run.sft.global_batch_size // at_once


def _set_up_logging(args: GranulonSFTConfig):
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("granulon").setLevel(logging.INFO if args.process_index == 0 else logging.ERROR)


def _fetched_name(run: Run) -> str:
    """The model's folder or Hub id; the tiny model is made on first use."""
    name = run.model.model_name_or_path
    if name != TINY:
        return name
    folder = run.output / TINY
    with PartialState().main_process_first():
        if not folder.exists():
            assemble_tiny(folder)
    return str(folder)


def _model(run: Run, name: str):
    return load_model(
        name,
        revision=run.model.model_revision,
        granularities=run.sft.granularities,
        dtype=run.model.dtype,
        attention=run.model.attn_implementation,
    )


def _rows(run: Run, sources: list[DataSource], quarantine: str, processor, model):
    args = run.trainer
    return load_rows(
        sources,
        processor,
        seed=args.seed if args.data_seed is None else args.data_seed,
        quarantine=run.output / quarantine,
        streaming=run.sft.streaming,
        max_bad_share=run.sft.max_bad_share,
        max_length=args.max_length,
        levels=model.config.granularity_names,
        num_proc=args.dataset_num_proc,
    )


@contextmanager
def _whole_or_absent(folder: Path) -> Iterator[Path]:
    """A folder for all processes to write to, which takes its name when they have; an older one gives way then."""
    state, draft, old = (
        PartialState(),
        folder.with_name(f".{folder.name}-draft"),
        folder.with_name(f".{folder.name}-old"),
    )
    if state.is_main_process:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    state.wait_for_everyone()
    yield draft
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    state.wait_for_everyone()


def _add_documents(trainer: GranulonTrainer, run: Run, folder: Path):
    (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle
    record_training(
        trainer.model.config,
        folder,
        stage=run.sft.stage,
        recipe=run.recipe,
        settings=run.given,
        rows=len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
        base=run.model.model_name_or_path,
        base_revision=getattr(trainer.model.config, "_commit_hash", None),
        seed=run.trainer.seed,
        processes=run.trainer.world_size,
        steps=trainer.state.global_step,
        annotators=trainer.replay.annotators if trainer.replay else [],
    )


if __name__ == "__main__":
    main()
