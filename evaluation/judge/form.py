"""The form of a judge's reply, and how an answer is cut into what the judge reads.

The segments are the authors': sentences in their order, an equal number in each of the first four, what remains in the
fifth. A segment without sentences is not scored **(ours; the authors have it judged)**.
"""

import re
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, field_validator

from granulon.evaluation.metrics import JUDGED, SEGMENTS

SCORES = dict(zip(("accuracy", "hallucination", "granularity"), JUDGED))  # in a reply, and as figures
EMPTY = "the answer is empty; scored without a call"
SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*")


class Scores(BaseModel):
    """Of a text, 0 to 100."""

    model_config = ConfigDict(extra="forbid")

    accuracy: int = Field(description="from 0 to 100")
    hallucination: int = Field(description="from 0 to 100")
    granularity: int = Field(description="from 0 to 100")

    # Not as bounds of the type: not every endpoint takes them in a strict schema.
    @field_validator(*SCORES)
    @classmethod
    def within_bounds(cls, value):
        if not 0 <= value <= 100:
            raise ValueError(f"a score is {value}; expected 0 to 100")
        return value


class Verdict(BaseModel):
    """A judge's reply; the reason comes first, so that the scores follow from it."""

    model_config = ConfigDict(extra="forbid")

    reason: str
    whole: Scores
    segment_1: Scores
    segment_2: Scores
    segment_3: Scores
    segment_4: Scores
    segment_5: Scores


def segments(text: str) -> list[str]:
    """The five segments of an answer, "" for those that it does not reach."""
    sentences = [sentence for sentence in SENTENCE_END.split(text.strip()) if sentence]
    size = max(1, len(sentences) // SEGMENTS)
    parts = [sentences[start * size : (start + 1) * size] for start in range(SEGMENTS - 1)]
    return [" ".join(part) for part in [*parts, sentences[(SEGMENTS - 1) * size :]]]


def cut_words(text: str, most: int) -> tuple[str, bool]:
    """The text up to its last allowed word, and whether that is not all of it."""
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    return (text.strip(), False) if len(ends) <= most else (text[: ends[most - 1]].strip(), True)


def no_answer() -> dict:
    """The verdict on an empty answer: nothing right, nothing made up, nothing said."""
    nothing = dict.fromkeys(SCORES, 0)
    return {"reason": EMPTY, "whole": nothing, **{f"segment_{n}": nothing for n in range(1, SEGMENTS + 1)}}


def statistics_of(verdict: dict, parts: Sequence[str]) -> dict[str, list[float]]:
    """Statistics as of any metric: the whole's by the figure's name, those of a segment that is not empty with its
    number behind."""
    found = {figure: [float(verdict["whole"][score]), 1.0] for score, figure in SCORES.items()}
    for number, part in enumerate(parts, 1):
        own = verdict[f"segment_{number}"]
        if part:
            found |= {f"{figure}_{number}": [float(own[score]), 1.0] for score, figure in SCORES.items()}
    return found
