"""A checkpoint counts when all of it is there: how that is made known, and which one a run resumes from.

`Trainer` writes a checkpoint file by file under its final name and then deletes older ones, so that a run killed in a
save leaves half of one, which transformers would pick, and with `save_total_limit=1` nothing else. Here a checkpoint
is sealed: when all processes have written, a last file, which appears in one rename, lists every other with its size.
Only then do older checkpoints go.
"""

import json
import os
import re
import shutil
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from huggingface_hub import snapshot_download
from huggingface_hub.utils import filter_repo_objects
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from granulon.hub.assemble import LICENCE_FILES, MANIFEST
from granulon.hub.manifest import versions

SEAL = "complete.json"
ASIDE = "incomplete-"  # a prefix that neither transformers nor this module takes for a checkpoint
# What has to travel with the weights, and what `save_pretrained` does not write.
DOCUMENTS = [MANIFEST, "licences/*", *LICENCE_FILES]
LIBRARIES = ("granulon", "transformers", "trl", "torch", "accelerate", "datasets")

logger = get_logger(__name__)


def is_complete(checkpoint: str | Path) -> bool:
    """Whether the checkpoint is sealed and every file in it still has the size it was sealed with."""
    checkpoint = Path(checkpoint)
    try:
        files = json.loads((checkpoint / SEAL).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError):
        return False


def newest_complete(folder: str | Path) -> Path | None:
    """The complete `checkpoint-STEP` of the highest step in a training's `output_dir`; None if there is none."""
    return max(filter(is_complete, _checkpoints(folder)), key=_step, default=None)


def resume_point(folder: str | Path) -> Path | None:
    """
    Where a run goes on, for `trainer.train(resume_from_checkpoint=...)`; to be called by all processes.

    Incomplete checkpoints go out of the way: those that a kill cut short are deleted. What has a trainer state but no
    seal may be a whole checkpoint of another trainer: it is renamed to `incomplete-checkpoint-STEP`, and stays.

    Returns:
        `Path` or None: the newest complete checkpoint; None means that training starts from the beginning.
    """
    state = PartialState()
    if state.is_main_process:
        _clear_incomplete(folder)
    state.wait_for_everyone()
    checkpoint = newest_complete(folder)
    logger.info(f"resuming from {checkpoint}" if checkpoint else f"no complete checkpoint in {folder}: starting anew")
    return checkpoint


@contextmanager
def complete_checkpoint(trainer, trial=None):
    """
    Around `Trainer._save_checkpoint`, by all processes: the checkpoint it writes is sealed, then older ones rotate.

    Raises:
        FileNotFoundError: the main process does not see what the others wrote, since their disk is another.
    """
    args = trainer.args
    run_folder = Path(trainer._get_output_dir(trial=trial))
    checkpoint = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    if args.should_save and checkpoint.exists():  # of an earlier run: its seal must not vouch for the new files
        shutil.rmtree(checkpoint)
    trainer.accelerator.wait_for_everyone()
    limit, args.save_total_limit = args.save_total_limit, None  # or older checkpoints would go before the seal
    try:
        yield
    finally:
        args.save_total_limit = limit
    if args.should_save:
        copy_documents(trainer.model.config, checkpoint)
        if (checkpoint / TRAINING_ARGS_NAME).exists():
            torch.save(args, checkpoint / TRAINING_ARGS_NAME)  # again, with the limit
    trainer.accelerator.wait_for_everyone()
    if args.should_save:
        seal(checkpoint, [] if args.save_only_model or args.save_on_each_node else _rng_files(args.world_size))
        rotate_checkpoints(
            output_dir=str(run_folder),
            save_total_limit=limit,
            best_model_checkpoint=trainer.state.best_model_checkpoint,
            use_mtime=True,
        )
    trainer.accelerator.wait_for_everyone()


def seal(checkpoint: Path, expected: list[str] = ()):
    """
    Say that the checkpoint is whole: bring its files to the disk, then write their sizes.

    Args:
        checkpoint: folder whose files are all written.
        expected: names of files that must be among them.

    Raises:
        FileNotFoundError: one of the expected files is absent.
    """
    absent = [name for name in expected if not (checkpoint / name).exists()]
    if absent:
        raise FileNotFoundError(
            f"{checkpoint} has no {', '.join(absent[:3])} ({len(absent)} of {len(expected)} processes' files are "
            "absent): put output_dir on a disk that all nodes share, or set save_on_each_node"
        )
    names = {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file()}
    files = {name: _flush(checkpoint / name) for name in sorted(names | set(expected))}
    draft = checkpoint / f"{SEAL}.draft"
    draft.write_text(json.dumps({"files": files}, indent=1) + "\n")
    _flush(draft)
    draft.rename(checkpoint / SEAL)
    _flush(checkpoint)


def copy_documents(config, folder: str | Path):
    """
    Manifest and licence files of the checkpoint that a model was loaded from go where its weights are saved.

    Args:
        config (`GranulonConfig`): of the model; it knows the folder or Hub repository it came from, if any.
        folder: where the model is saved.
    """
    source = _base_folder(config._name_or_path, getattr(config, "_commit_hash", None))
    if source is None or source.resolve() == Path(folder).resolve():
        return
    names = [str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()]
    for name in filter_repo_objects(names, allow_patterns=DOCUMENTS):
        target = Path(folder) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target)


def record_training(config, folder: Path, **told):
    """
    Licences and manifest of the base come along, as by `copy_documents`; the manifest gains an entry for a training.

    Args:
        told: what the entry says: stage, recipe, settings, rows, steps, seed, processes, base. Versions are added.
    """
    copy_documents(config, folder)
    tell_training(folder, **told)


def tell_training(folder: Path, **told):
    """The entry alone, in the manifest that the folder has."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text()) if path.exists() else {}
    manifest["training"] = [*manifest.get("training", []), {**told, "versions": versions(*LIBRARIES)}]
    path.write_text(json.dumps(manifest, indent=2) + "\n")


@cache
def _base_folder(name: str, revision: str | None) -> Path | None:
    """The folder a model was loaded from, or its documents fetched from the Hub; None for one made in memory."""
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=DOCUMENTS))
    except (OSError, ValueError) as error:
        logger.warning(f"the licence files of {name} are not to be had and are missing in checkpoints: {error}")
        return None


def _clear_incomplete(folder: str | Path):
    for checkpoint in _checkpoints(folder):
        if is_complete(checkpoint):
            continue
        if (checkpoint / TRAINER_STATE_NAME).exists() and not (checkpoint / SEAL).exists():
            aside = checkpoint.with_name(ASIDE + checkpoint.name)
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            logger.warning(
                f"{checkpoint} is not sealed as complete: put aside as {aside.name}, delete it if of no use"
            )
        else:
            shutil.rmtree(checkpoint)
            logger.warning(f"{checkpoint} was cut short by a kill: deleted")


def _checkpoints(folder: str | Path) -> list[Path]:
    return [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(path) is not None]


def _step(checkpoint: Path) -> int | None:
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", checkpoint.name)
    return int(match[1]) if match else None


def _rng_files(processes: int) -> list[str]:
    """What each process writes into a checkpoint, whatever the engine."""
    return ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]


def _flush(path: Path) -> int:
    """Bring a file or folder to the disk, so that a power cut after the seal loses nothing; its size in bytes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        return os.fstat(handle).st_size
    finally:
        os.close(handle)
