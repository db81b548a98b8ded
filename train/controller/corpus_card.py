"""A corpus as a folder that `datasets` loads: a file for each split, a report, and the dataset's card."""

import json
from collections import Counter
from pathlib import Path

from huggingface_hub import DatasetCardData, HfApi

from .corpus import TEST, TRAIN, VALIDATION, write_corpus

CARD, REPORT = "README.md", "report.json"
CARD_TEXT = """\
---
{metadata}
---

# Granularity corpus

Questions about images, each with the granularity at which an image should be read to answer it, for the controller of
[Granulon](https://arxiv.org/abs/2603.08800).

{origin}

The questions are those of `{data}`: {questions} of {rows} rows. Questions of one image are in one split.

{header}
{counted}

Columns: `id`, `question`, `level`, `level_probs`, `confidence`, `source`, `annotator`, `usage`, `created_at`, `split`.

```sh
granulon-train-controller --model CHECKPOINT --corpus FOLDER --output TRAINED
```

The licence of the questions is that of their source; it is not stated here because it is not known to the annotator.
"""


def write_folder(output: Path, rows: list[dict], report: dict, origin: str, data: str) -> dict:
    """
    Write the files; each appears when it is complete.

    Args:
        output: an existing folder.
        rows: of corpus.py, each with its split.
        report: what is told in `report.json`; `rows` and `questions` among it.
        origin: a paragraph on where the labels come from, for the card.
        data: what the questions were read from.

    Returns:
        dict: the report, with the number of rows of each level in each split.
    """
    splits = sorted({row["split"] for row in rows})
    for split in splits:
        write_corpus((row for row in rows if row["split"] == split), output / f"{split}.jsonl")
    for split in {TRAIN, VALIDATION, TEST}.difference(splits):  # of an earlier run that found rows for it
        (output / f"{split}.jsonl").unlink(missing_ok=True)
    counts = Counter((row["split"], row["level"]) for row in rows)
    names = list(rows[0]["level_probs"]) if rows else []
    report = report | {"levels": {split: {name: counts[split, name] for name in names} for split in splits}}
    _write_whole(output / REPORT, json.dumps(report, indent=1) + "\n")
    _write_whole(output / CARD, card(report, origin, data))
    return report


def _write_whole(path: Path, text: str):
    """The file appears when it is complete."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def card(report: dict, origin: str, data: str) -> str:
    """The card in Markdown, with the metadata that the Hub reads."""
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
        data=Path(data).name if Path(data).exists() else data,
        rows=report["rows"],
        questions=report["questions"],
        header=f"| split | {' | '.join(names)} |\n|---|{'--:|' * len(names)}",
        counted="\n".join(f"| {s} | {' | '.join(str(levels[s][name]) for name in names)} |" for s in levels),
    )


def upload_folder(output: Path, repo_id: str, private: bool) -> str:
    """Upload the corpus, and nothing of the run that made it, to a dataset repository; its address."""
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    return api.upload_folder(
        folder_path=output,
        repo_id=repo_id,
        repo_type="dataset",
        allow_patterns=["*.jsonl", "*.md", REPORT],
        ignore_patterns=["*/*"],
        commit_message="Granularity corpus",
    )
