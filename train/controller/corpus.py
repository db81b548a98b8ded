"""The granularity corpus: questions with the level each should be read at, one JSON object a line.

A row holds `id`, `question`, `level` (a name), `level_probs` (name to probability), `confidence` (that of the level),
`source` ("template", "annotated" or "measured"), `annotator` and `usage` (of a paid call, else null) and
`created_at`; beside these whatever its source knows, of which training reads `split`, `kind` and `phrasing`.

Splits are "train", "validation", and any number of others whose names begin with "test".
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

TRAIN, VALIDATION, TEST = "train", "validation", "test"
TEMPLATE, ANNOTATED, MEASURED = "template", "annotated", "measured"  # where labels come from
SHARES = {VALIDATION: 0.1, TEST: 0.1}  # of rows that bring no split along; the rest is for training
SUM_TOLERANCE = 1e-3


def corpus_row(
    question: str,
    level_probs: Mapping[str, float],
    source: str,
    *,
    key: str = "",
    level: str | None = None,
    annotator: dict | None = None,
    usage: dict | None = None,
    created_at: str | None = None,
    **more,
) -> dict:
    """
    A row in the corpus's form.

    Args:
        question, source: see the module.
        level_probs: the probability of each level, from coarse to fine.
        key: what tells rows of one question apart, such as a hash of image and answer; part of the id.
        level: the most probable one by default.
        more: further columns.
    """
    level = level or max(level_probs, key=level_probs.get)
    return {
        "id": hashlib.sha256(f"{source}\n{key}\n{question}".encode()).hexdigest()[:16],
        "question": question,
        "level": level,
        "level_probs": dict(level_probs),
        "confidence": level_probs[level],
        "source": source,
        "annotator": annotator,
        "usage": usage,
        "created_at": created_at or datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    }


def split_of(key: str) -> str:
    """A split that depends on the key alone, so that rows of one image (or question) stay together."""
    draw = draw_of(f"split\n{key}")
    for split, share in SHARES.items():
        if draw < share:
            return split
        draw -= share
    return TRAIN


def draw_of(key: str) -> float:
    """A number from 0 to 1 that depends on the key alone."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 16**8


def read_corpus(path: str | Path) -> list[dict]:
    """
    Rows of a JSONL file, or of the JSONL files of a folder, whose names then tell the split of rows without one.

    Raises:
        ValueError: nothing there, or a line that is no JSON object.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"{path} is no corpus: give a JSONL file, or a folder with JSONL files")
    rows = []
    for file in files:
        split = {"split": file.stem} if path.is_dir() and _is_split(file.stem) else {}
        with file.open(encoding="utf-8") as lines:
            rows += [split | _parse(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    return rows


def write_corpus(rows: Iterable[dict], path: str | Path):
    """Write rows as JSONL; the file appears when it is complete."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    draft.replace(path)


def check_rows(rows: Iterable[dict], levels: list[str]) -> list[dict]:
    """
    Rows with question, level, complete level_probs and split, in new dictionaries.

    A row needs `question` and `level` or `level_probs`; the other follows. A level that level_probs leaves out has
    probability 0. Rows without a split are divided by their question.

    Raises:
        ValueError: no rows, or one that lacks a column, names another level, or whose probabilities are none.
    """
    rows = [_checked(number, row, levels) for number, row in enumerate(rows)]
    if not rows:
        raise ValueError("the corpus is empty; expected rows with question, and level or level_probs")
    return rows


def _checked(number: int, row: dict, levels: list[str]) -> dict:
    where = f"row {number} of the corpus" + (f" (id {row['id']})" if row.get("id") else "")
    question, level, probs = (row.get(name) for name in ("question", "level", "level_probs"))
    if question is None or (level is None and not probs):
        raise ValueError(
            f"{where} has the columns {sorted(row)}; expected question, and level or level_probs, none of them null"
        )
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where} has the question {question!r}; expected text")
    if probs is not None and not isinstance(probs, Mapping):
        raise ValueError(f"{where} has level_probs {probs!r}; expected a mapping of {levels} to probabilities")
    unknown = sorted({name for name in (level, *(probs or {})) if name is not None and name not in levels}, key=str)
    if unknown:
        raise ValueError(f"{where} names the levels {unknown}; the model has {levels}")
    if not probs:
        probs = {level: 1.0}
    values = [probs.get(name) or 0.0 for name in levels]
    if not all(_is_share(value) for value in values) or abs(sum(values) - 1) > SUM_TOLERANCE:
        raise ValueError(f"{where} has level_probs {dict(probs)}; expected numbers from 0 to 1 whose sum is 1")
    complete = {name: value / sum(values) for name, value in zip(levels, values, strict=True)}
    level = level if level is not None else max(complete, key=complete.get)
    split = row.get("split") or split_of(question.strip())
    if not _is_split(split):
        raise ValueError(f"{where} has the split {split!r}; expected {TRAIN}, {VALIDATION} or {TEST}...")
    return row | {"level": level, "level_probs": complete, "split": split}


def _is_share(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and 0 <= value <= 1


def _is_split(name) -> bool:
    return isinstance(name, str) and (name in (TRAIN, VALIDATION) or name.startswith(TEST))


def _parse(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); expected one object a line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} holds {type(row).__name__}; expected one JSON object a line")
    return row
