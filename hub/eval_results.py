"""What `granulon-evaluate` found about a checkpoint, in the form that the Hub reads: `.eval_results/TASK.yaml`."""

import hashlib
import json
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

# What decides a model's answers; granulon-evaluate knows a folder by the hash of these.
WEIGHTS = ("*.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "processor_config.json")


def eval_results(output: Path, folder: Path) -> dict[str, bytes]:
    """
    The files for a checkpoint's repository; of each task the newest result, with all of its figures.

    What counts is what anybody would get who loads the checkpoint: finished cells of these very weights, at the level
    that the controller chooses, with all image tokens, on all samples of a data set that the Hub has.

    Args:
        output: folder that granulon-evaluate wrote to.
        folder: the checkpoint.

    Raises:
        ValueError: there is no such cell.
    """
    weights = weights_sha256(folder)
    cells = [json.loads(file.read_text(encoding="utf-8")) for file in output.glob("runs/*/result.json")]
    counting = sorted((cell for cell in cells if _counts(cell, weights)), key=lambda cell: cell["finished_at"])
    if not counting:
        raise ValueError(
            f"of {len(cells)} cells in {output} none is about {folder} as it answers by itself, on all samples of a "
            f"data set of the Hub: run granulon-evaluate --model {folder} --output {output} without --limit, "
            "--granularity, --view and --overrides"
        )
    return {f".eval_results/{cell['task']['name']}.yaml": _yaml(cell) for cell in counting}


def weights_sha256(folder: Path) -> str:
    """One hash of the files that decide what a model answers, as `granulon-evaluate` has it."""
    whole = hashlib.sha256()
    for file in sorted({file for pattern in WEIGHTS for file in Path(folder).glob(pattern)}):
        with open(file, "rb") as content:
            whole.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def _counts(cell: dict, weights: str) -> bool:
    row, settings = cell["entry"], cell["settings"]
    return (
        cell["model"].get("sha256") == weights
        and not cell["not_computed"]
        and (row["granularity"], row["view"], row["overrides"]) == (None, "full", {})
        and not settings["sample_rows"]
        and settings["limit"] is None
        and (cell["task"]["config"].get("dataset_path") or "").count("/") == 1
    )


def _yaml(cell: dict) -> bytes:
    task = cell["task"]
    entries = [
        EvalResultEntry(
            dataset_id=task["config"]["dataset_path"],
            task_id=f"{task['name']}.{figure}",
            value=round(entry["value"], 4),
            date=cell["finished_at"],
            notes=_interval(entry) + f"n = {entry['n']}",
        )
        for figure, entry in cell["metrics"].items()
        if entry["value"] is not None
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False).encode()


def _interval(entry: dict) -> str:
    known = entry["low"] is not None and entry["high"] is not None
    return f"95% interval {entry['low']:.4f} to {entry['high']:.4f}, " if known else ""
