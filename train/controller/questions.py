"""The distinct questions of a data set, each with the group (its image) that keeps its split together."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from datasets import Dataset

from granulon.train.data.formats import BadRow, parse_row
from granulon.train.data.quarantine import MIN_ROWS
from granulon.train.data.sources import DataSource, load_source, open_source


@dataclass
class DistinctQuestion:
    """A question, the group whose questions share a split (its image), and the number of rows it occurs in."""

    text: str
    group: str
    rows: int = 1


def read_questions(source: DataSource) -> tuple[list[DistinctQuestion], list[dict], int]:
    """
    The distinct questions of a source, the rows without a question (question, rows, reason), and the number of rows.

    Questions are read from the column "question" and images from "image" or "images", or from those that
    `source.columns` maps to `question` and `images`. Sources without such a column may hold conversations, messages
    or prompts: every user turn with an answer is then a question, and counts as a row.

    Raises:
        ValueError: a source that cannot be loaded, is empty or has no question.
    """
    questions, unusable, total = {}, [], 0
    for question, image in _all_questions(source):
        total += 1
        text = _text(question)
        if not text:
            shown = ascii(question) if isinstance(question, str) and question.strip() else question
            unusable.append({"question": shown, "rows": 1, "reason": f"row {total - 1} has no question that is text"})
        elif text in questions:
            questions[text].rows += 1
        else:
            questions[text] = DistinctQuestion(text, group=image or text)
    if not questions:
        raise ValueError(f"{source} has no question in its {total} rows")
    return list(questions.values()), unusable, total


def _text(question) -> str:
    """The question; "" where it is not text, or holds half of a surrogate pair, which no file can hold."""
    text = question.strip() if isinstance(question, str) else ""
    return text if text == text.encode(errors="ignore").decode() else ""


def _all_questions(source: DataSource) -> Iterator[tuple[str | None, str | None]]:
    """(question, key of its image) of every row, or of every turn of a conversation."""
    raw, is_lines = load_source(source)
    columns = set().union(*(row for row, _ in zip(_rows(raw, is_lines), range(MIN_ROWS))))
    mapped = source.columns or {}
    if (column := mapped.get("question", "question")) in columns:
        for row in _rows(raw, is_lines):
            yield row.get(column), image_key(row.get(mapped.get("images", "image"), row.get("images")))
        return
    try:
        raw, reader = open_source(source)
    except ValueError as error:
        raise ValueError(
            f"{source} has the columns {sorted(columns)} and no conversations; name the column with the questions: "
            '--data \'{"path": ..., "columns": {"question": NAME}}\''
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
    """The rows as stored, images undecoded."""
    for table in raw.with_format("arrow").iter(batch_size=1000):
        yield from table.to_pylist()


def _rows(raw: Dataset, is_lines: bool) -> Iterator[dict]:
    """The rows by column; {} for a line that is not a JSON object; empty lines are skipped."""
    for stored in _stored(raw):
        try:
            row = parse_row(stored, is_lines, raw.features)
        except BadRow:
            row = {}
        if row is not None:
            yield row


def _latest_question(prompt: list[dict]) -> str:
    content = next(message["content"] for message in reversed(prompt) if message["role"] == "user")
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if part.get("text"))


def image_key(image) -> str | None:
    """A key that identifies an image: the hash of its bytes, or its file name; None without an image."""
    if isinstance(image, (list, tuple)):
        image = image[0] if image else None
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    return hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else image or None
