"""Checkpoints with a completion marker: how it is written, and which checkpoint a run resumes from.

`Trainer` writes a checkpoint file by file under its final name and then deletes older ones. A run that is killed while
saving leaves an incomplete one, from which transformers would resume, and with `save_total_limit=1` no other. Here a
last file, written when all processes are done, lists every other file with its size; only then are older checkpoints
deleted.
"""

import json
import re
import shutil
from functools import cache
from pathlib import Path

from accelerate import PartialState
from accelerate.logging import get_logger
from huggingface_hub import snapshot_download
from huggingface_hub.utils import filter_repo_objects
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from granulon.hub.files import sync_to_disk, write_atomically
from granulon.hub.manifest import LICENCE_FILES, MANIFEST, append_training_record
from granulon.hub.text import first_line

MARKER = "complete.json"
RENAMED = "incomplete-"  # prefix of folders that neither transformers nor this module takes for checkpoints
# Files of the base model that belong to its weights and that `save_pretrained` does not write.
DOCUMENTS = [MANIFEST, "licences/*", *LICENCE_FILES]
LIBRARIES = ("granulon", "transformers", "trl", "torch", "accelerate", "datasets")

logger = get_logger(__name__)


def is_complete(checkpoint: str | Path) -> bool:
    """Whether the checkpoint has its completion marker and every file still has the size listed there."""
    checkpoint = Path(checkpoint)
    try:
        files = json.loads((checkpoint / MARKER).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError):
        return False


def newest_complete(folder: str | Path) -> Path | None:
    """The complete `checkpoint-STEP` of the highest step in a training's `output_dir`; None if there is none."""
    return max(filter(is_complete, _checkpoints(folder)), key=_step, default=None)


def resume_point(folder: str | Path) -> Path | None:
    """
    The checkpoint for `trainer.train(resume_from_checkpoint=...)`; all processes call this together.

    Incomplete checkpoints are deleted. One that has a trainer state but no completion marker may be a complete
    checkpoint of another trainer: it is renamed to `incomplete-checkpoint-STEP` and kept.

    Returns:
        `Path` or None: the newest complete checkpoint; None means that training starts from the beginning.
    """
    state = PartialState()
    if state.is_main_process:
        _clear_incomplete(folder)
    state.wait_for_everyone()
    checkpoint = newest_complete(folder)
    logger.info(
        f"resuming from {checkpoint}" if checkpoint else f"no complete checkpoint in {folder}: starting at step 0"
    )
    return checkpoint


def remove_checkpoint(trainer, checkpoint: Path):
    """Delete an earlier run's checkpoint of this step, whose marker would describe other files; by all processes."""
    if trainer.args.should_save and checkpoint.exists():
        shutil.rmtree(checkpoint)
    trainer.accelerator.wait_for_everyone()


def finish_checkpoint(trainer, checkpoint: Path, save_total_limit: int | None):
    """
    Complete the checkpoint that `Trainer._save_checkpoint` wrote, then delete older ones; by all processes.

    Raises:
        FileNotFoundError: the main process does not see the files of the others, because their disk is another.
    """
    args = trainer.args
    trainer.accelerator.wait_for_everyone()
    if args.should_save:
        copy_documents(trainer.model.config, checkpoint)
        write_marker(checkpoint, [] if args.save_only_model or args.save_on_each_node else _rng_files(args.world_size))
        rotate_checkpoints(
            output_dir=str(checkpoint.parent),
            save_total_limit=save_total_limit,
            best_model_checkpoint=trainer.state.best_model_checkpoint,
            use_mtime=True,
        )
    trainer.accelerator.wait_for_everyone()


def write_marker(checkpoint: Path, expected: list[str] = ()):
    """
    Write the completion marker: sync all files to the disk, then list them with their sizes in bytes.

    Args:
        checkpoint: folder whose files are all written.
        expected: names of files that must be among them.

    Raises:
        FileNotFoundError: one of the expected files is missing.
    """
    missing = [name for name in expected if not (checkpoint / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{checkpoint} has no {', '.join(missing[:3])} ({len(missing)} of {len(expected)} processes' files are "
            "missing): put output_dir on a disk that all nodes share, or set save_on_each_node"
        )
    names = sorted(str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file())
    sizes = {name: sync_to_disk(checkpoint / name) for name in names}
    write_atomically(checkpoint / MARKER, json.dumps({"files": sizes}, indent=1) + "\n")
    sync_to_disk(checkpoint)


def copy_documents(config, folder: str | Path):
    """
    Copy manifest and licence files of the checkpoint that a model was loaded from to where its weights are saved.

    Args:
        config (`GranulonConfig`): of the model; it knows the folder or Hub repository that it came from, if any.
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


def record_training(config, folder: Path, **record):
    """
    Copy the base model's documents and append an entry for a training to the manifest.

    Args:
        record: stage, recipe, settings, rows, steps, seed, processes, base; the versions of `LIBRARIES` are added.
    """
    copy_documents(config, folder)
    append_training_record(folder, LIBRARIES, **record)


@cache
def _base_folder(name: str, revision: str | None) -> Path | None:
    """The folder a model was loaded from, or its documents fetched from the Hub; None for one made in memory."""
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=DOCUMENTS))
    except (OSError, ValueError) as error:
        logger.warning(
            f"checkpoints lack the licence files of {name}, which cannot be downloaded: {first_line(error)}"
        )
        return None


def _clear_incomplete(folder: str | Path):
    for checkpoint in _checkpoints(folder):
        if is_complete(checkpoint):
            continue
        if (checkpoint / TRAINER_STATE_NAME).exists() and not (checkpoint / MARKER).exists():
            renamed = checkpoint.with_name(RENAMED + checkpoint.name)
            shutil.rmtree(renamed, ignore_errors=True)
            checkpoint.rename(renamed)
            logger.warning(
                f"{checkpoint} has no completion marker: renamed to {renamed.name}, delete it if it is of no use"
            )
        else:
            shutil.rmtree(checkpoint)
            logger.warning(f"{checkpoint} is incomplete, the run was killed while saving: deleted")


def _checkpoints(folder: str | Path) -> list[Path]:
    return [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(path) is not None]


def _step(checkpoint: Path) -> int | None:
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", checkpoint.name)
    return int(match[1]) if match else None


def _rng_files(processes: int) -> list[str]:
    """The file that each process writes into a checkpoint."""
    return ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
