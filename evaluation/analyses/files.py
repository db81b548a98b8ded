"""What the analyses share: questions, output files and colours."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from granulon.evaluation.matrix import model_identity, used_versions
from granulon.hub.answer import read_rows
from granulon.hub.files import write_atomically

# The palette of Okabe and Ito, for all kinds of colour vision, and marker shapes for prints without colour.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, FAINT = "#222222", "#777777"


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


def first_row_of_each_image(rows: list[dict]) -> list[dict]:
    """Rows of distinct images, in their order."""
    return list({str(row["image"]): row for row in reversed(rows)}.values())[::-1]


def describe_model(model: str) -> dict:
    """The name and the hash or revision of a model, for the JSON of an analysis."""
    return {"name": model, **{key: value for key, value in model_identity(model, "main").items() if key != "manifest"}}


def write_analysis(
    output: str | Path, name: str, report: dict, markdown: str, picture: Figure | Image.Image
) -> list[Path]:
    """Write an analysis as JSON, Markdown and PNG, a figure also as PDF; returns the files."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    made = {"versions": used_versions(), "made_at": datetime.now(UTC).isoformat(timespec="seconds")}
    contents = {
        "json": json.dumps(without_nan(report | made), indent=1, ensure_ascii=False) + "\n",
        "md": markdown.rstrip() + "\n",
    }
    if isinstance(picture, Figure):
        contents |= dict.fromkeys(("png", "pdf"), lambda path: picture.savefig(path, dpi=110))
    else:
        contents["png"] = lambda path: picture.save(path, optimize=True)
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
