"""The granularity corpus: questions with the level each should be read at, as a dataset folder of JSON Lines.

A row holds `id`, `question`, `level` (a name), `level_probs` (name to probability), `confidence` (that of the level),
`source` ("template", "annotated" or "measured"), `annotator`, `usage` (its share of the tokens of a paid call, else
null) and `created_at`; further columns depend on the source; training reads `split`, `kind` and `phrasing`.

Splits are "train", "validation", and any number of others whose names begin with "test".
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from huggingface_hub import DatasetCardData, HfApi

from granulon.hub.files import write_atomically, write_jsonl
from granulon.hub.text import markdown_table
from granulon.train.data.formats import BadRow, parse_json_object

TRAIN, VALIDATION, TEST = "train", "validation", "test"
TEMPLATE, ANNOTATED, MEASURED = "template", "annotated", "measured"  # where labels come from
SPLIT_SHARES = {VALIDATION: 0.1, TEST: 0.1}  # of rows without a split; the rest is for training
SUM_TOLERANCE = 1e-3
CARD, REPORT = "README.md", "report.json"
CARD_TEXT = """\
---
{metadata}
---

# Granularity corpus

Questions about images, each with the granularity at which an image should be read to answer it, for the controller of
[Granulon](https://arxiv.org/abs/2603.08800).

{origin}

The questions come from {data}: {questions} of {rows} rows. Questions about one image are in one split.

{table}

Columns: `id`, `question`, `level`, `level_probs`, `confidence`, `source`, `annotator`, `usage`, `created_at`, `split`.

```sh
granulon-train-controller --model CHECKPOINT --corpus FOLDER --output TRAINED
```

The questions keep the licence of their source, which the program does not know and therefore does not state here.
"""


def corpus_row(
    question: str,
    level_probs: Mapping[str, float],
    source: str,
    *,
    key: str = "",
    annotator: dict | None = None,
    usage: dict | None = None,
    created_at: str | None = None,
    **more,
) -> dict:
    """
    A row in the corpus's form; its level is the most probable one.

    Args:
        question, source, annotator, usage: columns, see the module.
        level_probs: the probability of each level, from coarse to fine.
        key: part of the id that distinguishes rows with the same question, such as a hash of image and answer.
        created_at: now by default.
        more: further columns.
    """
    level = max(level_probs, key=level_probs.get)
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
    """A split that depends on the key alone, so that rows about one image (or question) stay together."""
    draw = hash_fraction(f"split\n{key}")
    for split, share in SPLIT_SHARES.items():
        if draw < share:
            return split
        draw -= share
    return TRAIN


def hash_fraction(key: str) -> float:
    """A number from 0 to 1 that depends on the key alone."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 16**8


def read_corpus(path: str | Path) -> list[dict]:
    """
    Rows of a JSON Lines file, or of those of a folder; there a file's name is the split of rows without one.

    Raises:
        ValueError: no file there, or a line that is not a JSON object.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"{path} is not a corpus: give a JSON Lines file, or a folder with such files")
    rows = []
    for file in files:
        split = {"split": file.stem} if path.is_dir() and _is_split(file.stem) else {}
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                try:
                    rows.append(split | parse_json_object(line))
                except BadRow as error:
                    raise ValueError(f"{file}:{number}: {error}; repair or remove the line") from error
    return rows


def check_rows(rows: Iterable[dict], levels: list[str]) -> list[dict]:
    """
    Rows with question, level, complete level_probs and split, in new dictionaries.

    A row needs `question` and `level` or `level_probs`; the other follows. A level that level_probs leaves out has
    probability 0. Rows without a split get one from their question.

    Raises:
        ValueError: no rows, or a row without these columns, with another level, or with invalid probabilities.
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
    values = [(probs or {level: 1.0}).get(name) or 0.0 for name in levels]
    if not all(map(_is_probability, values)) or abs(sum(values) - 1) > SUM_TOLERANCE:
        raise ValueError(f"{where} has level_probs {dict(probs)}; expected numbers from 0 to 1 whose sum is 1")
    complete = {name: value / sum(values) for name, value in zip(levels, values, strict=True)}
    level = level if level is not None else max(complete, key=complete.get)
    split = row.get("split") or split_of(question.strip())
    if not _is_split(split):
        raise ValueError(f"{where} has the split {split!r}; expected {TRAIN}, {VALIDATION} or {TEST}...")
    return row | {"level": level, "level_probs": complete, "split": split}


def _is_probability(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and 0 <= value <= 1


def _is_split(name) -> bool:
    return isinstance(name, str) and (name in (TRAIN, VALIDATION) or name.startswith(TEST))


def write_folder(output: Path, rows: list[dict], report: dict, origin: str, data: list[str]) -> dict:
    """
    Write a corpus as a folder that `datasets` loads: a file per split, report.json, and the card.

    Args:
        output: an existing folder.
        rows: each with its split.
        report: content of report.json; `rows` and `questions` among it.
        origin: a paragraph for the card on where the labels come from.
        data: names or paths of the data that the questions come from.

    Returns:
        dict: the report, with the number of rows of each level in each split.
    """
    splits = sorted({row["split"] for row in rows})
    for split in splits:
        write_jsonl(output / f"{split}.jsonl", (row for row in rows if row["split"] == split))
    for split in {TRAIN, VALIDATION, TEST}.difference(splits):  # of an earlier run that found rows for it
        (output / f"{split}.jsonl").unlink(missing_ok=True)
    counts = Counter((row["split"], row["level"]) for row in rows)
    names = list(rows[0]["level_probs"]) if rows else []
    report = report | {"levels": {split: {name: counts[split, name] for name in names} for split in splits}}
    write_atomically(output / REPORT, json.dumps(report, indent=1) + "\n")
    write_atomically(output / CARD, card(report, origin, data))
    return report


def card(report: dict, origin: str, data: list[str]) -> str:
    """The dataset card in Markdown, with the metadata that the Hub reads; arguments as of `write_folder`."""
    levels = report["levels"]
    metadata = DatasetCardData(
        pretty_name="Granularity corpus",
        task_categories=["text-classification"],
        tags=["granulon", "granularity"],
        configs=[{"config_name": "default", "data_files": [{"split": s, "path": f"{s}.jsonl"} for s in levels]}],
    )
    names = list(next(iter(levels.values()), {}))
    return CARD_TEXT.format(
        metadata=metadata.to_yaml(),
        origin=origin,
        data=", ".join(f"`{Path(name).name if Path(name).exists() else name}`" for name in data),
        rows=report["rows"],
        questions=report["questions"],
        table=markdown_table(["split", *names], [[split, *counts.values()] for split, counts in levels.items()]),
    )


def upload_corpus(output: Path, repo_id: str) -> str:
    """Upload a corpus folder without its run/ folder to a dataset repository, made private if new; its address."""
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=True, exist_ok=True)
    return api.upload_folder(
        folder_path=output,
        repo_id=repo_id,
        repo_type="dataset",
        allow_patterns=["*.jsonl", "*.md", REPORT],
        ignore_patterns=["*/*"],
        commit_message="Granularity corpus",
    )
