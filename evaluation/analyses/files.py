"""What the analyses share: the questions they ask, the files they leave, and the colours in them."""

import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path

from matplotlib.figure import Figure

from granulon.evaluation.cells import model_identity, used_versions, write_whole
from granulon.hub.ask import open_image
from granulon.hub.batch import read_rows

# Okabe and Ito's colours, told apart with any colour vision; and marks, told apart without any colour.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
# From coarse to fine, light to dark: read in grey too.
LEVEL_COLOURS = ("#cfe1f2", "#6baed6", "#2171b5", "#08306b")
INK, FAINT = "#222222", "#777777"


def read_questions(source: str, limit: int | None = None) -> list[dict]:
    """
    Rows with `image`, `question` and, where there is one, `answer` (or `truth`).

    Args:
        source: a JSON list, a JSON Lines file, a folder of images or a dataset, as `granulon-ask --batch` takes them.
            Images of a JSON list are looked for where the command runs, then beside the list.

    Raises:
        ValueError: nothing there, a row without image or question, or a limit below 1.
    """
    path = Path(source)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    if path.suffix == ".json" and path.is_file() and path.read_text().lstrip().startswith("["):
        rows = [_found(path, number, row) for number, row in enumerate(_json_list(path))]
    else:
        rows = read_rows(source)
    rows = [rows[number] for number in range(min(len(rows), limit or len(rows)))]
    if not rows:
        raise ValueError(f"{source} holds no rows; give some with image and question")
    return [row | {"answer": row.get("answer") or row.get("truth")} for row in rows]


def opened(row: dict):
    """The image of a row, RGB; raises `ValueError` where it cannot be used."""
    return open_image(row["image"]) if isinstance(row["image"], str) else row["image"]


def one_image_each(rows: list[dict]) -> list[dict]:
    """The first row of every image."""
    return list({str(row["image"]): row for row in reversed(rows)}.values())[::-1]


def write_analysis(output: str | Path, name: str, report: dict, markdown: str, figure: Figure | None) -> list[Path]:
    """JSON, Markdown, PNG and PDF of an analysis; each file appears complete or not at all."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    files = [output / f"{name}.json", output / f"{name}.md"]
    made = {"versions": used_versions(), "made_at": datetime.now(UTC).isoformat(timespec="seconds")}
    write_whole(files[0], json.dumps(without_nan(report | made), indent=1, ensure_ascii=False) + "\n")
    write_whole(files[1], markdown.rstrip() + "\n")
    return files + ([save(figure, output / f"{name}.{suffix}") for suffix in ("png", "pdf")] if figure else [])


def save(picture, path: Path) -> Path:
    """A figure of matplotlib or an image of PIL; the file appears complete or not at all."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    if isinstance(picture, Figure):
        picture.savefig(draft, format=path.suffix[1:], dpi=110)
    else:
        picture.save(draft, format=path.suffix[1:].upper(), optimize=True)
    draft.replace(path)
    return path


def asked_of(model: str, arguments: dict) -> dict:
    """For the JSON: which model was looked at, and how."""
    identity = {key: value for key, value in model_identity(model, "main").items() if key != "manifest"}
    return {"model": {"name": model, **identity}, "arguments": arguments}


def table(header: list[str], rows: list[list], text_columns: int = 1) -> str:
    """A Markdown table; the columns after the first ones are aligned to the right."""
    lines = [header, ["---"] * text_columns + ["--:"] * (len(header) - text_columns), *rows]
    return "\n".join("| " + " | ".join(str(entry).replace("|", "\\|") for entry in line) + " |" for line in lines)


def ranged(value, low, high, digits: int = 2) -> str:
    """A value with its interval, empty where there is none."""
    if value is None or math.isnan(value):
        return ""
    known = low is not None and not math.isnan(low)
    return f"{value:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if known else "")


def without_nan(value):
    """For JSON, which has no word for them: None in place of numbers that are none."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json_list(path: Path) -> list:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give a list of rows with image and question") from error


def _found(path: Path, number: int, row: dict) -> dict:
    if not isinstance(row, dict) or not row.get("image") or not row.get("question"):
        held = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"row {number} of {path} holds {held}; a row needs image and question")
    if isinstance(row["image"], str) and not Path(row["image"]).exists():
        beside = path.parent / row["image"]
        return row | {"image": str(beside)} if beside.exists() else row
    return dict(row)
