"""Where two judges, or two runs of one, differ: a report to be read by a person, the widest differences first."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from granulon.evaluation.statistics import percentiles, resampled
from granulon.evaluation.cells import read_samples, write_whole
from granulon.evaluation.metrics import METRICS

from .form import SCORES

SHOWN = 50  # samples; the table counts all
LONGEST = 3000  # letters of a text that are shown


@dataclass(frozen=True)
class Pair:
    """A sample that both judges have scored."""

    cell: str
    sample: dict
    first: dict
    second: dict

    def difference(self, score: str) -> int:
        return self.second["whole"][score] - self.first["whole"][score]

    @property
    def widest(self) -> int:
        return max(abs(self.difference(score)) for score in SCORES)


def pairs_of(results: list[dict], first: str, second: str) -> list[Pair]:
    """All samples that both have scored, the widest difference first."""
    pairs = []
    for result in results:
        if not {first, second} <= result["judges"].keys():
            continue
        verdicts = [
            {sample["id"]: sample["verdict"] for sample in result["judges"][name]["samples"]}
            for name in (first, second)
        ]
        pairs += [
            Pair(result["cell"], sample, verdicts[0][sample["id"]], verdicts[1][sample["id"]])
            for sample in read_samples(Path(result["folder"]))
            if sample["id"] in verdicts[0] and sample["id"] in verdicts[1]
        ]
    return sorted(pairs, key=lambda pair: -pair.widest)


def write_report(path: Path, results: list[dict], first: str, second: str):
    """
    Write the report in Markdown.

    Raises:
        ValueError: no sample has been scored by both.
    """
    pairs = pairs_of(results, first, second)
    if not pairs:
        raise ValueError(f"{first} and {second} have no sample in common; have both judge the same cells")
    lines = [
        "# Where two judges differ",
        "",
        f"First: `{first}`. Second: `{second}`. {len(pairs)} answers were scored by both; the "
        f"{min(SHOWN, len(pairs))} with the widest differences follow. Means with 95% bootstrap intervals; a "
        "difference is the second's score less the first's.",
        "",
        "| score | first | second | difference | mean distance | rank correlation |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_summary(score, pairs) for score in SCORES),
    ]
    for number, pair in enumerate(pairs[:SHOWN], 1):
        lines += ["", *_told(number, pair)]
    write_whole(path, "\n".join(lines) + "\n")


def _summary(score: str, pairs: list[Pair]) -> str:
    scores_P2 = np.array([[pair.first["whole"][score], pair.second["whole"][score]] for pair in pairs], dtype=float)
    difference_P = scores_P2[:, 1] - scores_P2[:, 0]
    mean = METRICS["mean"].value
    low, high = percentiles(resampled(mean, np.stack([difference_P, np.ones(len(pairs))], axis=1)))
    varies = (scores_P2.std(0) > 0).all()
    rank = f"{spearmanr(*scores_P2.T).statistic:.2f}" if varies else "one of them gives a single score"
    first, second = scores_P2.mean(0)
    difference = f"{difference_P.mean():+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"| {score} | {first:.1f} | {second:.1f} | {difference} | {np.abs(difference_P).mean():.1f} | {rank} |"


def _told(number: int, pair: Pair) -> list[str]:
    """One sample: what was asked, what the reference and the model say, what each judge gave and why."""
    sample = pair.sample
    references = [text for text in sample["references"] if isinstance(text, str) and text.strip()]
    table = [
        f"| {name} | " + " | ".join(str(verdict["whole"][score]) for score in SCORES) + " |"
        for name, verdict in (("first", pair.first), ("second", pair.second))
    ]
    return [
        f"## {number}. {pair.cell}, sample {sample['id']}: {pair.widest} apart",
        "",
        f"| | {' | '.join(SCORES)} |",
        "| --- | --- | --- | --- |",
        *table,
        "",
        *_quoted("Question", sample["question"]),
        *_quoted("Reference", "\n".join(references) or "(none)"),
        *_quoted("Answer", sample["answer"] or "(empty)"),
        *_quoted("First judge", pair.first["reason"]),
        *_quoted("Second judge", pair.second["reason"]),
    ]


def _quoted(title: str, text: str) -> list[str]:
    """A text as it is, whatever Markdown stands in it."""
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} ... ({len(text) - LONGEST} more letters)"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{title}:", "", f"{fence}text", text, fence, ""]
