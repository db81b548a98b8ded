"""The questions of a data set, each once, with what keeps those of one image together."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from datasets import Dataset

from granulon.train.data.formats import BadRow, parsed
from granulon.train.data.quarantine import FEWEST_ROWS
from granulon.train.data.sources import DataSource, load_source, open_source


@dataclass
class Asked:
    """A distinct question: in how many rows it stands, and what keeps its image's questions in one split."""

    question: str
    group: str
    rows: int = 1


def read_questions(
    source: DataSource, column: str = "question", image_column: str = "image"
) -> tuple[list[Asked], list[dict], int]:
    """
    The distinct questions of a source, the rows that hold none (question, rows, reason), and how many rows there are.

    Args:
        column: holds the questions. Where it is absent, conversations, messages and prompts are read: every user turn
            that is answered asks, and counts as a row.
        image_column: tells which rows are of one image; may be absent.

    Raises:
        ValueError: a source that cannot be loaded, is empty or holds no question.
    """
    asked, unusable, total = {}, [], 0
    for question, image in _all_questions(source, column, image_column):
        total += 1
        text = _text(question)
        if not text:
            shown = ascii(question) if isinstance(question, str) and question.strip() else question
            unusable.append({"question": shown, "rows": 1, "reason": f"row {total - 1} has no question that is text"})
        elif text in asked:
            asked[text].rows += 1
        else:
            asked[text] = Asked(text, group=image or text)
    if not asked:
        raise ValueError(f"{source} has no question in its {total} rows")
    return list(asked.values()), unusable, total


def _text(question) -> str:
    """The question, empty where there is none; half of a pair of surrogates is no text, and no file can hold it."""
    text = question.strip() if isinstance(question, str) else ""
    return text if text.isascii() or text == text.encode(errors="ignore").decode() else ""


def _all_questions(source: DataSource, column: str, image_column: str) -> Iterator[tuple[str | None, str | None]]:
    """(question, what tells its image from others) of every row, or of every turn of a conversation."""
    raw, is_lines = load_source(source)
    columns = set().union(*(row for row, _ in zip(_rows(raw, is_lines), range(FEWEST_ROWS))))
    if column in columns:
        for row in _rows(raw, is_lines):
            yield row.get(column), image_key(row.get(image_column))
        return
    try:
        raw, reader = open_source(source)
    except ValueError as error:
        raise ValueError(
            f"{source} has the columns {sorted(columns)} and no conversations; name the one with the questions by "
            "--question_column"
        ) from error
    for stored in _stored(raw):
        try:
            turns = reader.turns(stored)
        except BadRow:
            yield None, None
        else:
            for turn in turns:
                yield _latest_question(turn.prompt), image_key(turn.images)


def _stored(raw: Dataset) -> Iterator[dict]:
    """The rows as they lie there, no image decoded."""
    for table in raw.with_format("arrow").iter(batch_size=1000):
        yield from table.to_pylist()


def _rows(raw: Dataset, is_lines: bool) -> Iterator[dict]:
    """The rows by column; a line that is no JSON object has none, and an empty one is no row."""
    for stored in _stored(raw):
        try:
            row = parsed(stored, is_lines, raw.features)
        except BadRow:
            row = {}
        if row is not None:
            yield row


def _latest_question(prompt: list[dict]) -> str:
    content = next(message["content"] for message in reversed(prompt) if message["role"] == "user")
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if part.get("text"))


def image_key(image) -> str | None:
    """What tells an image from others: a hash of its bytes, or else its name."""
    if isinstance(image, (list, tuple)):
        image = image[0] if image else None
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    return hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else image or None
