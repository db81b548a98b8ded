"""What a judge returns, and how answers are cut for it.

Our judge scores the whole answer. The authors' scores five segments: sentences in their order, an equal number in each
of the first four, the rest in the fifth; segments without text are shown as "(empty)" and scored like the others.
"""

import re
from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model

from granulon.evaluation.metrics import JUDGED, SEGMENTS

SCORES = dict(zip(("accuracy", "hallucination", "granularity"), JUDGED))  # name in a reply: name of the figure
SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*")
EMPTY_SEGMENT = "(empty)"


def _within_bounds(value: int) -> int:
    if not 0 <= value <= 100:
        raise ValueError(f"a score is {value}; expected 0 to 100")
    return value


# Not as bounds of the type: some endpoints reject them in a strict schema.
Score = Annotated[int, AfterValidator(_within_bounds), Field(description="from 0 to 100")]


class Verdict(BaseModel):
    """Our judge's reply. The reason comes first, so that the scores follow from it."""

    model_config = ConfigDict(extra="forbid")

    reason: str
    accuracy: Score
    hallucination: Score
    granularity: Score

    @staticmethod
    def statistics(reply: dict) -> dict[str, list[float]]:
        """Statistics as of any metric, by figure."""
        return {figure: [float(reply[score]), 1.0] for score, figure in SCORES.items()}


SegmentScores = create_model("SegmentScores", **{f"segment_{n}": (Score, ...) for n in range(1, SEGMENTS + 1)})


class SegmentVerdict(BaseModel):
    """The authors' judge's reply."""

    accuracy_scores: SegmentScores
    hallucination_scores: SegmentScores

    @staticmethod
    def statistics(reply: dict) -> dict[str, list[float]]:
        """Statistics as of any metric, by figure: of the mean over the segments, and with a number of each segment."""
        found = {}
        for score in ("accuracy", "hallucination"):
            own = [float(reply[f"{score}_scores"][f"segment_{number}"]) for number in range(1, SEGMENTS + 1)]
            found[SCORES[score]] = [sum(own) / SEGMENTS, 1.0]
            found |= {f"{SCORES[score]}_{number}": [value, 1.0] for number, value in enumerate(own, 1)}
        return found


# Of our judge for an empty answer, which needs no call.
EMPTY_VERDICT = {"reason": "the answer is empty", **dict.fromkeys(SCORES, 0)}


def segments(text: str) -> list[str]:
    """The authors' segments of an answer. As in their code, a text that ends with a full stop has one more sentence,
    an empty one."""
    sentences = SENTENCE_END.split(text.strip())
    size = max(1, len(sentences) // SEGMENTS)
    bounds = [*(size * number for number in range(SEGMENTS)), len(sentences)]
    return [" ".join(sentences[start:end]).strip() or EMPTY_SEGMENT for start, end in pairwise(bounds)]


def cut_words(text: str, most: int) -> tuple[str, bool]:
    """The first `most` words of a text, and whether there were more."""
    ends = [word.end() for word in re.finditer(r"\S+", text)]
    return (text.strip(), False) if len(ends) <= most else (text[: ends[most - 1]].strip(), True)
