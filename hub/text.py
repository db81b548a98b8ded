"""Text for people: error messages in one line, numbers with intervals, Markdown tables; the words of an answer."""

import math
import re
from collections.abc import Sequence

WORD = re.compile(r"\w+")
ARTICLES = {"a", "an", "the"}


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message, or the name of its class if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def markdown_table(header: list[str], rows: list[list], text_columns: int = 1) -> str:
    """A Markdown table; the first `text_columns` columns are aligned to the left, the others to the right."""
    lines = [header, ["---"] * text_columns + ["--:"] * (len(header) - text_columns), *rows]
    return "\n".join(
        "| " + " | ".join(str(entry).replace("|", "\\|").replace("\n", " ") for entry in line) + " |" for line in lines
    )


def with_interval(value: float | None, low: float | None = None, high: float | None = None, digits: int = 2) -> str:
    """A value with its interval, such as "0.71 [0.65, 0.77]"; "" for None and NaN."""
    if value is None or math.isnan(value):
        return ""
    known = low is not None and high is not None and not math.isnan(low)
    return f"{value:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if known else "")


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case and in order."""
    return WORD.findall(text.lower())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer has the words of a reference, in order and without articles, else 0."""
    return float(any(content_words(answer) == content_words(reference) for reference in usable_references(references)))


def content_words(text: str) -> str:
    """The words of a text without articles, separated by spaces."""
    return " ".join(word for word in words(text) if word not in ARTICLES)


def usable_references(references: Sequence[str]) -> list[str]:
    """The references that have words; raises `ValueError` where none has."""
    if isinstance(references, str):
        references = [references]
    usable = [reference for reference in references if isinstance(reference, str) and words(reference)]
    if not usable:
        raise ValueError(f"a sample has no reference with words in it, found {list(references)!r}")
    return usable
