"""What the analyses share: questions, finished runs, output files and colours."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from granulon.evaluation.matrix import largest_runs, model_identity, read_samples, used_versions
from granulon.hub.answer import read_rows
from granulon.hub.files import write_atomically

# The palette of Okabe and Ito, for all kinds of colour vision, and marker shapes for prints without colour.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FAINT = "#777777"


def read_questions(source: str, limit: int | None = None) -> list[dict]:
    """
    Rows with `image`, `question` and `answer` (from `answer` or `truth`; None without both).

    Args:
        source: a file, folder or data set as `granulon.hub.answer.read_rows` takes it.
        limit: read only the first rows.

    Raises:
        ValueError: no rows, or a row without image or question.
    """
    rows = read_rows(source)
    rows = [rows[number] for number in range(min(len(rows), limit or len(rows)))]
    return [row | {"answer": row.get("answer") or row.get("truth")} for row in rows]


def finished_runs(output: str | Path, only: Sequence[str] = ()) -> list[dict]:
    """
    The largest finished run of each entry and task, with its samples under `samples_read`.

    Args:
        output: output folder of granulon-evaluate.
        only: names of entries; all by default.

    Raises:
        ValueError: no finished run, or none of a name.
    """
    found = largest_runs(Path(output), only)
    return [result | {"samples_read": read_samples(Path(result["folder"]))} for result in found]


def settings_of(run: dict) -> dict:
    """The entry of a run, and how it was evaluated."""
    entry, level = run["entry"], run["entry"].get("granularity")
    return {
        "group": entry.get("group", ""),
        "entry": entry["name"],
        "view": entry.get("view", "full"),
        "granularity": entry.get("overrides", {}).get("controller") if level is None else level,
    }


def run_name(run: dict) -> str:
    """The entry of a run, or of what was made of one, with its task (of a run), view and level."""
    name, settings = (
        (run["run"], settings_of(run)) if "run" in run else (f"{run['group']} {run['entry']}".strip(), run)
    )
    return f"{name} ({', '.join(str(settings[key]) for key in ('view', 'granularity') if settings[key] is not None)})"


def left_out_notes(left_out: dict[str, str]) -> list[str]:
    """A line for each reason, with the runs that were left out for it."""
    reasons = defaultdict(list)
    for name, reason in left_out.items():
        reasons[reason].append(name)
    return [f"Left out, since {reason}: {'; '.join(names)}." for reason, names in reasons.items()]


def describe_model(model: str) -> dict:
    """The name and the hash or revision of a model, for the JSON of an analysis."""
    return {"name": model, **{key: value for key, value in model_identity(model, "main").items() if key != "manifest"}}


def write_analysis(output: str | Path, name: str, report: dict, markdown: str, picture: Figure) -> list[Path]:
    """Write an analysis as JSON, Markdown, PNG and PDF; returns the files."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    made = {"versions": used_versions(), "made_at": datetime.now(UTC).isoformat(timespec="seconds")}
    contents = {
        "json": json.dumps(without_nan(report | made), indent=1, ensure_ascii=False) + "\n",
        "md": markdown.rstrip() + "\n",
        **dict.fromkeys(("png", "pdf"), lambda path: picture.savefig(path, dpi=110)),
    }
    for suffix, content in contents.items():
        write_atomically(output / f"{name}.{suffix}", content)
    return [output / f"{name}.{suffix}" for suffix in contents]


def without_nan(value):
    """Plain values for JSON: arrays as lists, and None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [without_nan(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
