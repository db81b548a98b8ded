"""The distinct questions of a data set, each with the group (its image) that keeps its split together."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from datasets import Dataset

from granulon.train.data.formats import BadRow, parse_row
from granulon.train.data.quarantine import MIN_ROWS
from granulon.train.data.sources import DataSource, load_source, open_source

from .corpus import hash_fraction


@dataclass
class DistinctQuestion:
    """A question, the group whose questions share a split (its image), source and kind, and how many rows have it."""

    text: str
    group: str
    stratum: str = ""
    rows: int = 1


def read_questions(sources: list[DataSource]) -> tuple[list[DistinctQuestion], list[dict], int]:
    """
    The distinct questions of sources, the rows without a question (question, rows, reason), and the number of rows.

    Questions are read from the column "question" and images from "image" or "images", or from those that
    `source.columns` maps to `question` and `images`. Sources without such a column may hold conversations, messages
    or prompts: every user turn with an answer is then a question, and counts as a row.

    Raises:
        ValueError: a source that cannot be loaded, is empty or has no question.
    """
    questions, unusable, total = {}, [], 0
    for source in sources:
        rows = list(_all_questions(source))
        if not any(_text(question) for question, _, _ in rows):
            raise ValueError(f"{source} has no question in its {len(rows)} rows")
        for number, (question, image, stratum) in enumerate(rows):
            text = _text(question)
            if not text:
                shown = ascii(question) if isinstance(question, str) and question.strip() else question
                reason = f"row {number} has no question that is text ({source})"
                unusable.append({"question": shown, "rows": 1, "reason": reason})
            elif text in questions:
                questions[text].rows += 1
            else:
                questions[text] = DistinctQuestion(text, image or text, f"{source} {stratum}")
        total += len(rows)
    return list(questions.values()), unusable, total


def stratified(questions: list[DistinctQuestion], seed: int) -> list[DistinctQuestion]:
    """The questions in an order whose every beginning has of each stratum its share, drawn with the seed."""
    strata = defaultdict(list)
    for question in sorted(questions, key=lambda question: hash_fraction(f"{seed}\n{question.text}")):
        strata[question.stratum].append(question)
    place = {
        question.text: (rank + hash_fraction(f"{seed}\n{stratum}")) / len(members)
        for stratum, members in strata.items()
        for rank, question in enumerate(members)
    }
    return sorted(questions, key=lambda question: place[question.text])


def _text(question) -> str:
    """The question; "" where it is not text, or holds half of a surrogate pair, which no file can hold."""
    text = question.strip() if isinstance(question, str) else ""
    return text if text == text.encode(errors="ignore").decode() else ""


def _all_questions(source: DataSource) -> Iterator[tuple[str | None, str | None, str]]:
    """(question, key of its image, stratum) of every row, or of every turn of a conversation."""
    raw, is_lines = load_source(source)
    columns = set().union(*(row for row, _ in zip(_rows(raw, is_lines), range(MIN_ROWS))))
    mapped = source.columns or {}
    if (column := mapped.get("question", "question")) in columns:
        for row in _rows(raw, is_lines):
            image = row.get(mapped.get("images", "image"), row.get("images"))
            yield row.get(column), image_key(image), _stratum(row, image)
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
            yield None, None, ""
        else:
            row = reader.row(stored) if turns else {}
            stratum = _stratum(row, row.get(reader.columns.get("images")))
            for turn in turns:
                yield _latest_question(turn.prompt), image_key(turn.images), stratum


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


def _stratum(row: dict, image) -> str:
    """What is known of a question's source and kind: the columns of these names, and its image's first folder."""
    image = _first_image(image)
    folder = image.split("/")[0] if isinstance(image, str) and "/" in image else ""
    return str((row.get("source"), row.get("kind"), folder))


def image_key(image) -> str | None:
    """A key that identifies an image: the hash of its bytes, or its file name; None without an image."""
    image = _first_image(image)
    return hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else image or None


def _first_image(image) -> bytes | str | None:
    if isinstance(image, (list, tuple)):
        image = image[0] if image else None
    return image.get("bytes") or image.get("path") if isinstance(image, dict) else image
