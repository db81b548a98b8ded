"""From an answer to statistics, and from statistics to figures: for our tasks, and for lmms-eval's own.

lmms-eval stores with each sample what its metric needs. For our tasks that are statistics (metrics.py) already; for
its own, `READINGS` says how they follow from what is stored, so that every figure has an interval and can be compared
sample by sample. POPE's answers are read here as answers, where lmms-eval takes anything but a bare "yes" for wrong
and reports the references' yes rate; HallusionBench is judged by its yes and no, without a paid judge.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from .metrics import (
    BERTSCORE_MODEL,
    METRICS,
    bertscore_statistics,
    chair_statistics,
    choice_statistics,
    read_yes_no,
    statistics,
    value,
    yes_no_statistics,
)
from .statistics import interval

UNSCORED = "unscored"  # in place of metrics, for a sample that cannot be scored: why
YES_NO = ("accuracy", "f1", "precision", "recall", "yes_rate", "always_yes", "unclear")


@dataclass(frozen=True)
class Reading:
    """
    A figure that follows from what lmms-eval stores with a sample.

    Args:
        metric: the name in `METRICS` that gives the value of the sums.
        statistics: of what is stored.
        group: samples that are right only together, by the name of their group; None counts each alone.
    """

    metric: str
    statistics: Callable[[dict], Sequence[float]]
    group: Callable[[dict], str] | None = None


def scored(names: Sequence[str], answer: str, references: Sequence[str]) -> dict:
    """The statistics of an answer, or why it has none: a sample whose reference is missing does not end a run."""
    try:
        return statistics(names, answer, references)
    except ValueError as error:
        return {UNSCORED: str(error)}


def scored_choice(answer: str, choices: Sequence[str], right: int | None) -> dict:
    """As `scored`, for a choice among several."""
    if right is None or not 0 <= right < len(choices):
        return {UNSCORED: f"the right choice is {right}, of {len(choices)}"}
    return choice_statistics(answer, choices, right)


def bertscore(pairs: Sequence[dict], model: str = BERTSCORE_MODEL) -> float:
    """lmms-eval's aggregation of `bertscore`, whose samples hold texts."""
    answers, references = [pair["answer"] for pair in pairs], [pair["references"] for pair in pairs]
    return value("bertscore", bertscore_statistics(answers, references, model))


recall, vqa_accuracy, bleu, choice_accuracy, choice_unclear, exact_match = (
    partial(value, name)
    for name in ("recall", "vqa_accuracy", "bleu", "choice_accuracy", "choice_unclear", "exact_match")
)


def statistics_of(sample: dict, names: Sequence[str]) -> tuple[dict[str, list[float]], dict[str, str]]:
    """
    The statistics of a sample that lmms-eval logged, by figure, and the groups of those that are counted in groups.

    Args:
        names: of the task's metrics; one that is neither ours, nor a number, nor in `READINGS` is left out.
    """
    found, groups = {}, {}
    for name in names:
        stored = sample.get(name)
        if stored is None:
            continue
        if name in READINGS:
            for figure, reading in READINGS[name].items():
                found[figure] = [float(entry) for entry in reading.statistics(stored)]
                if reading.group is not None:
                    groups[figure] = reading.group(stored)
        elif name in METRICS and isinstance(stored, (list, dict)):
            found[name] = stored
        elif isinstance(stored, (bool, int, float)):
            found[name] = [float(stored), 1.0]
    return found, groups


def metric_of(figure: str) -> str:
    """The entry of `METRICS` that a figure is computed by; a plain number of lmms-eval's is averaged."""
    if figure in METRICS:
        return figure
    return next((own[figure].metric for own in READINGS.values() if figure in own), "mean")


def units(samples: Sequence[dict], figure: str) -> dict[str, list[float]]:
    """Statistics by unit: a sample, or a group of samples that is right (1) only where all of it is."""
    found = {}
    for sample in samples:
        own = sample["statistics"].get(figure)
        if own is None:
            continue
        unit = sample.get("groups", {}).get(figure, str(sample["id"]))
        found[unit] = [min(own[0], found[unit][0]), 1.0] if unit in found else own
    return found


def figures(samples: Sequence[dict], seed: int = 0) -> dict[str, dict]:
    """Value, 95% interval and number of units of every figure that the samples have statistics for."""
    names = dict.fromkeys(name for sample in samples for name in sample["statistics"])
    found = {}
    for name in names:
        metric = METRICS[metric_of(name)]
        statistics_NS = np.array(list(units(samples, name).values()), dtype=float)
        low, high = interval(metric.value, statistics_NS, seed)
        found[name] = {
            "value": _or_none(metric.value(statistics_NS.sum(0, keepdims=True))[0]),
            "low": _or_none(low),
            "high": _or_none(high),
            "n": len(statistics_NS),
            "higher_is_better": metric.higher_is_better,
        }
    return found


def _or_none(number: float) -> float | None:
    """JSON has no nan."""
    return float(number) if np.isfinite(number) else None


def _right(stored: dict) -> list[float]:
    return [stored["is_correct"], 1]


def _same_letter(stored: dict) -> list[float]:
    return [stored["pred"].strip().lower() == stored["answer"].strip().lower(), 1]


def _share(top: str, bottom: str) -> Callable[[dict], list[float]]:
    return lambda stored: [stored[top], stored[bottom]]


def _hallusion(stored: dict) -> list[float]:
    """Without a judge: the first yes or no against the reference's."""
    said = read_yes_no(stored["model_prediction"])
    return [said is not None and said == (str(stored["gt_answer"]) == "1"), 1]


def _hallusion_group(last: str) -> Callable[[dict], str]:
    return lambda stored: "_".join(str(stored[key]) for key in ("category", "subcategory", "set_id", last))


def _chair(stored: dict) -> list[float]:
    return chair_statistics(stored["pred"], stored["answer"])


def _pope(stored: dict) -> list[float]:
    return yes_no_statistics(stored["prediction"], stored["ground_truth"] == "yes")


READINGS: dict[str, dict[str, Reading]] = {
    "seed_image": {"seed_image": Reading("accuracy", _same_letter)},
    "seed_video": {"seed_video": Reading("accuracy", _same_letter)},
    "seed_all": {"seed_all": Reading("accuracy", _same_letter)},
    "pope_accuracy": {f"yes_no_{name}": Reading(f"yes_no_{name}", _pope) for name in YES_NO},
    **{f"pope_{name}": {} for name in ("precision", "recall", "f1_score", "yes_ratio")},  # all in the line above
    "mmvp_accuracy": {"mmvp_accuracy": Reading("accuracy", _right)},
    "mmvp_pair_accuracy": {
        "mmvp_pair_accuracy": Reading("accuracy", _right, lambda stored: str(stored["pair_index"]))
    },
    "cv_bench_acc": {"cv_bench_acc": Reading("accuracy", _right)},
    "aAcc": {"aAcc": Reading("accuracy", _hallusion)},
    "qAcc": {"qAcc": Reading("accuracy", _hallusion, _hallusion_group("question_id"))},
    "fAcc": {"fAcc": Reading("accuracy", _hallusion, _hallusion_group("figure_id"))},
    "coco_cap_chair_i": {name: Reading(name, _chair) for name in ("chair_i", "chair_s", "chair_cover")},
    "coco_cap_chair_s": {},
    "coco_cap_recall": {},
    "amber_chair": {"amber_chair": Reading("ratio_wrong", _share("chair_score", "chair_num"))},
    "amber_cover": {"amber_cover": Reading("ratio", _share("safe_cover_score", "safe_cover_num"))},
    "amber_hal": {
        "amber_hal": Reading(
            "ratio_wrong",
            lambda stored: [stored["non_hallu_num"] - stored["non_hallu_score"], stored["non_hallu_num"]],
        )
    },
    "amber_cog": {"amber_cog": Reading("ratio_wrong", _share("hallu_cover_score", "hallu_cover_num"))},
}
