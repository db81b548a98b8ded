"""`granulon-train`: alignment and joint tuning by recipe.

    granulon-train --config tiny-cpu
    granulon-train --config sft-qwen2.5-1.5b --print
    accelerate launch -m granulon.train.sft --config recipe.yaml --learning_rate 1e-5

A recipe is a YAML file with the values of options, found by its path or, in train/recipes/, by its name; `base:` names
a recipe that it changes. Options on the command line override it. stages.py says what each stage trains.

`output_dir` receives the checkpoints, the rows that could not be used (quarantine.jsonl) and, when training has ended,
the model in `model/`, or with adapters `adapter/` and, with `merge`, `model/`. Both appear only when complete.
"""

import argparse
import json
import logging
import math
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import reduce
from huggingface_hub import HfApi
from transformers import TrainerCallback, set_seed
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import is_bitsandbytes_available
from trl import ModelConfig, TrlParser

from granulon.hub.assemble import assemble_tiny
from granulon.hub.inference import load_model, load_processor
from granulon.hub.publish import PublishArguments, check_before_training
from granulon.hub.publish import run as publish
from granulon.train.controller.replay import QuestionReplay, load_corpus
from granulon.train.data import DataSource, load_rows
from modeling_granulon.image_tokens import SEMANTIC

from .arguments import GranulonSFTConfig
from .checkpoints import newest_complete, record_training, resume_point
from .stages import STAGES, lora_config, merge, quantization, set_trainable
from .trainer import GranulonTrainer

RECIPES = Path(__file__).parent / "recipes"
TINY = "tiny"  # as a model's name: the small random model of `granulon-assemble --tiny`
MODEL, ADAPTER = "model", "adapter"  # folders under output_dir
NOT_GIVEN = object()  # in place of an option's default, so that the dataclass has it
EXCLUDED_FROM_MANIFEST = ("output_dir", "logging_dir", "hub_token", "push_to_hub_token", "resume", "merge")

logger = logging.getLogger(__name__)


@dataclass
class SFTArguments:
    """What a recipe sets beyond the options of the trainer and of the model."""

    stage: str = field(default="sft", metadata={"help": "which parts of the model are trained", "choices": [*STAGES]})
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "files, folders, Hub datasets or 'scenes'; a recipe may give DataSource's arguments"},
    )
    eval_data: list[str] = field(default_factory=list, metadata={"help": "as data, for evaluation"})
    streaming: bool = field(default=False, metadata={"help": "read data (not eval_data) during training, not before"})
    stream_rows: int | None = field(
        default=None, metadata={"help": "rows of a stream that make an epoch, which set max_steps"}
    )
    max_bad_share: float = field(
        default=0.01, metadata={"help": "stop if more than this share of a source's rows is unusable"}
    )
    answers_per_row: int | None = field(
        default=None, metadata={"help": "answers of a conversation that share a row; by default all that fit"}
    )
    granularities: list[str] | None = field(
        default=None, metadata={"help": "levels that replace the checkpoint's, in JSON; [] for none"}
    )
    global_batch_size: int | None = field(
        default=None, metadata={"help": "rows per step over all processes; sets gradient_accumulation_steps"}
    )
    replay_corpus: str | None = field(
        default=None, metadata={"help": "granularity corpus that the controller keeps learning: a file, or 'seed'"}
    )
    unfreeze_vision_blocks: int = field(
        default=0, metadata={"help": "last blocks of the vision tower that stage sft trains too, without adapters"}
    )
    merge: bool = field(default=False, metadata={"help": "also save the model with the adapters merged"})
    resume: bool = field(default=False, metadata={"help": "continue from the newest complete checkpoint, if any"})

    def __post_init__(self):
        if self.stage not in STAGES:
            raise ValueError(f"stage is {self.stage!r}; choose one of {tuple(STAGES)}")
        self.data = [DataSource.of(entry) for entry in self.data]
        self.eval_data = [DataSource.of(entry) for entry in self.eval_data]
        if self.answers_per_row is not None and self.answers_per_row < 1:
            raise ValueError(f"answers_per_row is {self.answers_per_row}; give a number above 0, or leave it out")
        if self.granularities is not None:
            self.granularities = [level for entry in self.granularities for level in _levels(entry)]


@dataclass
class Run:
    """The arguments of a run, and those that recipe and command line set (for the manifest)."""

    sft: SFTArguments
    trainer: GranulonSFTConfig
    model: ModelConfig
    recipe: str | None
    given: dict
    publishes: bool  # the finished model, to hub_model_id

    @property
    def output(self) -> Path:
        return Path(self.trainer.output_dir)


def main(argv: list[str] | None = None, callbacks: list[TrainerCallback] = ()):
    """Run `granulon-train` with the arguments `argv`; `callbacks` are passed to the trainer."""
    stop = StopOnSignal()
    try:
        run = parse(sys.argv[1:] if argv is None else argv)
        trainer = make_trainer(run, [stop, *callbacks])
        checkpoint = resume_point(run.output) if run.sft.resume else None
    except (OSError, ValueError) as error:
        sys.exit(f"granulon-train: {error}")
    print_once(summary(trainer, run))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < trainer.state.max_steps and stop.asked:
        print_once(f"stopped by a signal after step {trainer.state.global_step}; continue with --resume")
        return
    for folder in save(trainer, run):
        print_once(f"wrote {folder}")
    if run.publishes and PartialState().is_main_process:
        try:
            publish(_publish_arguments(run, folder, trainer.model.config), HfApi(token=run.trainer.hub_token))
        except (OSError, ValueError) as error:
            sys.exit(
                f"granulon-train: {folder} is complete but not published: {error}; granulon-publish does it later"
            )


def parse(argv: list[str]) -> Run:
    """
    The run that a command line describes.

    Raises:
        ValueError: an unknown recipe or key, or settings that contradict each other.
        SystemExit: an unknown option, `--help`, or `--print`, which prints the recipe.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", help="recipe: a YAML file, or the name of one in train/recipes/")
    first.add_argument("--print", action="store_true", help="print the whole recipe and exit")
    chosen, argv = first.parse_known_args(argv)
    recipe = read_recipe(chosen.config) if chosen.config is not None else {}
    if chosen.print:
        print(yaml.safe_dump(recipe, sort_keys=False), end="")
        raise SystemExit
    types = (SFTArguments, GranulonSFTConfig, ModelConfig)
    parser = TrlParser(types, description=__doc__, parents=[first])
    names = [entry.name for kind in types for entry in fields(kind) if entry.init]
    if unknown := recipe.keys() - set(names):
        raise ValueError(f"the recipe {chosen.config} has {', '.join(sorted(unknown))}, which is not an option")
    if not {"-h", "--help"} & set(argv):  # the help shows the defaults of the dataclasses
        parser.set_defaults(**dict.fromkeys(names, NOT_GIVEN) | recipe)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not NOT_GIVEN}
    sft, trainer, model = (kind(**{name: given[name] for name in _init_names(kind) & given.keys()}) for kind in types)
    values = {name: value for part in (sft, trainer, model) for name, value in vars(part).items()}
    recorded = {name: values[name] for name in names if name in given and name not in EXCLUDED_FROM_MANIFEST}
    name = Path(chosen.config).name.removesuffix(".yaml") if chosen.config is not None else None
    publishes, trainer.push_to_hub = trainer.push_to_hub, False  # Trainer would upload its checkpoints as they are
    run = Run(sft, trainer, model, name, json.loads(json.dumps(recorded, default=_set_fields)), publishes)
    _check(run)
    if sft.global_batch_size is not None:
        trainer.gradient_accumulation_steps = _accumulation(run)
    if sft.stream_rows is not None and trainer.max_steps <= 0:
        step = trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps * trainer.world_size
        trainer.max_steps = math.ceil(sft.stream_rows / step * trainer.num_train_epochs)
    return run


def read_recipe(name: str) -> dict:
    """
    The values of a recipe, a YAML file or the name of one in train/recipes/, over those of its `base`.

    Raises:
        ValueError: no such recipe, or not a mapping in YAML.
    """
    path = Path(name) if Path(name).is_file() else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
        raise ValueError(f"there is no recipe {name}; give a YAML file or one of {', '.join(known)}")
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds a {type(recipe).__name__}; a recipe maps options to values")
    base = recipe.pop("base", None)
    return recipe if base is None else read_recipe(base) | recipe


def make_trainer(run: Run, callbacks: list[TrainerCallback] = ()) -> GranulonTrainer:
    """Model, processor, rows and trainer of a run; raises `ValueError` or `OSError` where one cannot be made."""
    _set_up_logging(run.trainer)
    set_seed(run.trainer.seed)
    name = _model_name(run)
    if run.publishes and PartialState().is_main_process and not run.sft.resume:
        check_before_training(_publish_arguments(run, name), HfApi(token=run.trainer.hub_token))
    model = _model(run, name, quantization(run.model))
    processor = load_processor(name, model.config, revision=run.model.model_revision)
    rows = _rows(run, run.sft.data, "quarantine.jsonl", processor, model, run.sft.streaming)
    eval_rows = None
    if run.sft.eval_data:
        eval_rows = _rows(run, run.sft.eval_data, "quarantine_eval.jsonl", processor, model)
    set_trainable(model, run.sft.stage, run.sft.unfreeze_vision_blocks)
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
    with _replace_when_complete(folder) as draft:
        trainer.save_model(str(draft))
        if PartialState().is_main_process:
            _add_documents(trainer, run, draft)
    if not (run.model.use_peft and run.sft.merge):
        return [folder]
    merged = run.output / MODEL
    with _replace_when_complete(merged) as draft:
        if PartialState().is_main_process:
            model = merge(_model(run, _model_name(run)), folder)
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


def summary(trainer: GranulonTrainer, run: Run) -> str:
    """What will be trained, in one line."""
    total, trained = (trainer.model.num_parameters(only_trainable=only) for only in (False, True))
    args = trainer.args
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = f"{len(trainer.train_dataset):,} rows" if hasattr(trainer.train_dataset, "__len__") else "streamed rows"
    return f"stage {run.sft.stage}: {trained:,} of {total:,} parameters are trained on {rows}, {batch} per step"


def print_once(line: str):
    """Print on the main process alone."""
    if PartialState().is_main_process:
        print(line, flush=True)


def _levels(entry: str | dict) -> list[dict]:
    """The levels of an entry, which is a level or JSON of one or several."""
    try:
        levels = json.loads(entry) if isinstance(entry, str) else entry
    except ValueError as error:
        raise ValueError(f"granularities is not JSON ({error}): {entry}") from error
    levels = levels if isinstance(levels, list) else [levels]
    if wrong := [level for level in levels if not isinstance(level, dict)]:
        raise ValueError(f"granularities has {wrong}; each is a mapping with name, stride, clusters and keep")
    return levels


def _init_names(kind: type) -> set[str]:
    return {entry.name for entry in fields(kind) if entry.init}


def _set_fields(source: DataSource) -> dict:
    return {name: value for name, value in vars(source).items() if value is not None}


def _check(run: Run):
    if not run.model.model_name_or_path:
        raise ValueError("model_name_or_path is missing; give an assembled checkpoint or 'tiny'")
    if run.model.load_in_4bit or run.model.load_in_8bit:
        if not run.model.use_peft:
            raise ValueError("weights in 4 or 8 bits cannot be trained themselves; set use_peft to train adapters")
        if not is_bitsandbytes_available():
            raise ValueError("load_in_4bit and load_in_8bit need the package bitsandbytes: pip install bitsandbytes")
    if run.sft.unfreeze_vision_blocks and (run.model.use_peft or run.sft.stage != "sft"):
        raise ValueError(
            "unfreeze_vision_blocks trains whole blocks of the tower in stage sft; set it to 0, or use_peft to false "
            "and stage to sft"
        )
    if run.trainer.vision_learning_rate is not None and not run.sft.unfreeze_vision_blocks:
        raise ValueError("vision_learning_rate is of blocks of the tower; set unfreeze_vision_blocks, or leave it out")
    if run.model.dtype != "float32" and not run.model.use_peft:
        raise ValueError(
            f"dtype is {run.model.dtype}, too coarse for small updates of the weights; set dtype to float32 (bf16 "
            "makes the arithmetic bfloat16), or train adapters with use_peft"
        )
    if run.sft.stream_rows is not None and (not run.sft.streaming or run.sft.stream_rows < 1):
        raise ValueError(f"stream_rows is {run.sft.stream_rows}; it is the number of rows of a stream: set streaming")
    if run.sft.streaming and run.trainer.max_steps <= 0 and not run.sft.stream_rows:
        raise ValueError("a stream has no known end; give stream_rows, the rows of an epoch, or max_steps")
    if run.sft.merge and not run.model.use_peft:
        raise ValueError("merge needs adapters; set use_peft, or leave merge out")
    if run.sft.replay_corpus is not None and not run.trainer.granularity_loss_weight:
        raise ValueError("replay_corpus trains the controller; give granularity_loss_weight a value above 0")
    if run.sft.stage == "align" and (run.model.use_peft or run.trainer.granularity_loss_weight > 0):
        raise ValueError(
            "stage align trains the projector alone; set use_peft to false and granularity_loss_weight to 0"
        )
    if run.model.load_in_4bit and run.trainer.eval_strategy != "no" and run.trainer.device.type == "cpu":
        raise ValueError(  # there it packs the weights for inference in a way that passes no gradients on
            "bitsandbytes cannot go on training weights in 4 bits on a CPU after an evaluation; set eval_strategy to "
            "'no'"
        )
    if run.trainer.activation_offloading and not torch.accelerator.is_available():
        raise ValueError("activation_offloading keeps the activations of a GPU in the CPU's memory; set it to false")
    if run.trainer.eval_strategy != "no" and not run.sft.eval_data:
        raise ValueError(
            f"eval_strategy is {run.trainer.eval_strategy} but there is no eval_data; name some, or set it to 'no'"
        )
    if run.publishes:
        _check_publishing(run)
    found = newest_complete(run.output)
    if found is not None and not run.sft.resume:
        raise ValueError(f"{found} exists already; add --resume to continue from it, or choose another output_dir")


def _check_publishing(run: Run):
    name = run.trainer.hub_model_id or ""
    if name.count("/") != 1:
        raise ValueError(f"hub_model_id is {name!r}; push_to_hub needs OWNER/NAME")
    if unused := {"hub_strategy", "hub_always_push"} & run.given.keys():
        raise ValueError(f"push_to_hub publishes the finished model, once; leave {' and '.join(sorted(unused))} out")
    if run.model.use_peft and not run.sft.merge and Path(run.model.model_name_or_path).exists():
        raise ValueError(
            f"model_name_or_path is {run.model.model_name_or_path}, a local folder, and others cannot use an adapter "
            "without its base; set merge to publish the whole model, or push_to_hub to false"
        )


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


def _model_name(run: Run) -> str:
    """The model's folder or Hub id; the tiny model is assembled on first use."""
    name = run.model.model_name_or_path
    if name != TINY:
        return name
    folder = run.output / TINY
    with PartialState().main_process_first():
        if not folder.exists():
            assemble_tiny(folder)
    return str(folder)


def _model(run: Run, name: str, quantization_config=None):
    levels = run.sft.granularities
    return load_model(
        name,
        revision=run.model.model_revision,
        overrides=None if levels is None else {"granularities": levels},
        new_levels=levels is not None,
        dtype=run.model.dtype,
        attn_implementation=run.model.attn_implementation,
        quantization_config=quantization_config,
    )


def _rows(run: Run, sources: list[DataSource], quarantine: str, processor, model, streaming: bool = False):
    args, levels = run.trainer, model.config.granularities
    return load_rows(
        sources,
        processor,
        seed=args.seed if args.data_seed is None else args.data_seed,
        quarantine=run.output / quarantine,
        streaming=streaming,
        max_bad_share=run.sft.max_bad_share,
        max_length=args.max_length,
        levels=model.config.granularity_names,
        level_tokens={level["name"]: level["keep"] for level in levels} if args.visual_view == SEMANTIC else None,
        answers_per_row=run.sft.answers_per_row,
        num_proc=args.dataset_num_proc,
    )


def _publish_arguments(run: Run, folder: str | Path, config=None) -> PublishArguments:
    """The options of granulon-publish for a folder: the finished model, or the one that training starts from."""
    options = {"private": bool(run.trainer.hub_private_repo)}
    if run.trainer.hub_revision is not None:
        options["revision"] = run.trainer.hub_revision
    if run.model.use_peft and not run.sft.merge:
        revision = getattr(config, "_commit_hash", None)
        options["base_model"] = "@".join(filter(None, (run.model.model_name_or_path, revision)))
    return PublishArguments(str(folder), run.trainer.hub_model_id, **options)


@contextmanager
def _replace_when_complete(folder: Path) -> Iterator[Path]:
    """A draft folder for all processes to write to, which replaces `folder` at the end of the block."""
    state, draft = PartialState(), folder.with_name(f".{folder.name}-draft")
    if state.is_main_process:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    state.wait_for_everyone()
    yield draft
    state.wait_for_everyone()
    if state.is_main_process:
        old = folder.with_name(f".{folder.name}-old")
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
