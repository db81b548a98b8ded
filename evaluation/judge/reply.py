"""The schema of a judge's reply, and how an answer is cut for the judge.

The segments are the authors': sentences in their order, an equal number in each of the first four, the rest in the
fifth. A segment without sentences gets no score **(ours; the authors have it judged)**.
"""

import re
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator

from granulon.evaluation.metrics import JUDGED, SEGMENTS

SCORES = dict(zip(("accuracy", "hallucination", "granularity"), JUDGED))  # name in a reply: name of the figure
SEGMENT_NAMES = [f"segment_{number}" for number in range(1, SEGMENTS + 1)]
SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*")


class Scores(BaseModel):
    """The scores of a text, 0 to 100."""

    model_config = ConfigDict(extra="forbid")

    accuracy: int = Field(description="from 0 to 100")
    hallucination: int = Field(description="from 0 to 100")
    granularity: int = Field(description="from 0 to 100")

    # Not as bounds of the type: some endpoints reject them in a strict schema.
    @field_validator(*SCORES)
    @classmethod
    def within_bounds(cls, value):
        if not 0 <= value <= 100:
            raise ValueError(f"a score is {value}; expected 0 to 100")
        return value


# The reason comes first, so that the scores follow from it.
Verdict = create_model(
    "Verdict",
    __config__=ConfigDict(extra="forbid"),
    __doc__="A judge's reply.",
    reason=(str, ...),
    whole=(Scores, ...),
    **dict.fromkeys(SEGMENT_NAMES, (Scores, ...)),
)


def segments(text: str) -> list[str]:
    """The five segments of an answer; "" for those without a sentence."""
    sentences = [sentence for sentence in SENTENCE_END.split(text.strip()) if sentence]
    size = max(1, len(sentences) // SEGMENTS)
    parts = [sentences[start * size : (start + 1) * size] for start in range(SEGMENTS - 1)]
    return [" ".join(part) for part in [*parts, sentences[(SEGMENTS - 1) * size :]]]


def cut_words(text: str, most: int) -> tuple[str, bool]:
    """The first `most` words of a text, and whether there were more."""
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    return (text.strip(), False) if len(ends) <= most else (text[: ends[most - 1]].strip(), True)


def empty_verdict() -> dict:
    """The verdict on an empty answer, which needs no call: 0 in all scores."""
    zero = dict.fromkeys(SCORES, 0)
    return {"reason": "the answer is empty", "whole": zero, **dict.fromkeys(SEGMENT_NAMES, zero)}


def statistics_of(verdict: dict, parts: Sequence[str]) -> dict[str, list[float]]:
    """Statistics as of any metric, by figure: of the complete answer, and with a number of its segments with text."""
    found = {figure: [float(verdict["whole"][score]), 1.0] for score, figure in SCORES.items()}
    for number, part in enumerate(parts, 1):
        if part:
            own = verdict[f"segment_{number}"]
            found |= {f"{figure}_{number}": [float(own[score]), 1.0] for score, figure in SCORES.items()}
    return found
