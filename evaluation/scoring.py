"""From an answer to statistics, and from statistics to figures, for our tasks and those of lmms-eval.

lmms-eval stores with each sample what its metric needs. For our tasks these are statistics (metrics.py) already; for
its own, `LMMS_EVAL_FIGURES` says how to compute them from what is stored, so that every figure has an interval and
can be compared sample by sample. In POPE and HallusionBench the first yes or no of an answer is read, whereas
lmms-eval counts anything but a bare "yes" of POPE as wrong and needs a paid judge for HallusionBench.
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

UNSCORED = "unscored"  # key with the reason why a sample has no score
YES_NO = ("accuracy", "f1", "precision", "recall", "yes_rate", "always_yes", "unclear")


@dataclass(frozen=True)
class StoredFigure:
    """
    A figure that is computed from what lmms-eval stores with a sample.

    Args:
        metric: the entry of `METRICS` that gives the value of the sums.
        statistics: function of what is stored.
        group: function that names the group of a sample, for samples that count as correct only together.
    """

    metric: str
    statistics: Callable[[dict], Sequence[float]]
    group: Callable[[dict], str] | None = None


def text_scores(names: Sequence[str], answer: str, references: Sequence[str]) -> dict:
    """The statistics of an answer, or the reason for none: a sample without reference must not end a run."""
    try:
        return statistics(names, answer, references)
    except ValueError as error:
        return {UNSCORED: str(error)}


def choice_scores(answer: str, choices: Sequence[str], correct: int | None) -> dict:
    """As `text_scores`, for the index of the correct one of several choices."""
    if correct is None or not 0 <= correct < len(choices):
        return {UNSCORED: f"the correct choice is {correct}, of {len(choices)}"}
    return choice_statistics(answer, choices, correct)


# The aggregations that our tasks name, for lmms-eval's own command.
recall, vqa_accuracy, bleu, choice_accuracy, choice_unclear, exact_match = (
    partial(value, name)
    for name in ("recall", "vqa_accuracy", "bleu", "choice_accuracy", "choice_unclear", "exact_match")
)


def bertscore(pairs: Sequence[dict], model: str = BERTSCORE_MODEL) -> float:
    """The aggregation of `bertscore`, whose samples hold texts."""
    answers, references = [pair["answer"] for pair in pairs], [pair["references"] for pair in pairs]
    return value("bertscore", bertscore_statistics(answers, references, model))


def statistics_of(sample: dict, names: Sequence[str]) -> tuple[dict[str, list[float]], dict[str, str]]:
    """
    The statistics of a sample that lmms-eval logged, by figure, and its group for figures that are counted in groups.

    Args:
        names: the task's metrics; those that are not known here and not stored as a number are left out.
    """
    found, groups = {}, {}
    for name in names:
        stored = sample.get(name)
        if stored is None:
            continue
        if name in LMMS_EVAL_FIGURES:
            for figure, how in LMMS_EVAL_FIGURES[name].items():
                found[figure] = [float(number) for number in how.statistics(stored)]
                if how.group is not None:
                    groups[figure] = how.group(stored)
        elif name in METRICS and isinstance(stored, (list, dict)):
            found[name] = stored
        elif isinstance(stored, (bool, int, float)):
            found[name] = [float(stored), 1.0]
    return found, groups


def metric_of(figure: str) -> str:
    """The entry of `METRICS` that computes a figure; an unknown number of lmms-eval is averaged."""
    if figure in METRICS:
        return figure
    return next((own[figure].metric for own in LMMS_EVAL_FIGURES.values() if figure in own), "mean")


def units(samples: Sequence[dict], figure: str) -> dict[str, list[float]]:
    """Statistics by unit: a sample, or a group of samples, which is correct (1) only if all of its samples are."""
    found = {}
    for sample in samples:
        own = sample["statistics"].get(figure)
        if own is None:
            continue
        unit = sample.get("groups", {}).get(figure, str(sample["id"]))
        found[unit] = [min(own[0], found[unit][0]), 1.0] if unit in found else own
    return found


def figures(samples: Sequence[dict]) -> dict[str, dict]:
    """Value, 95% interval and number of units of every figure that the samples have statistics for."""
    names = dict.fromkeys(name for sample in samples for name, own in sample["statistics"].items() if own is not None)
    found = {}
    for name in names:
        metric = METRICS[metric_of(name)]
        statistics_NS = np.array(list(units(samples, name).values()), dtype=float)
        numbers = (metric.value(statistics_NS.sum(0, keepdims=True))[0], *interval(metric.value, statistics_NS))
        numbers = [float(number) if np.isfinite(number) else None for number in numbers]  # JSON has no nan
        n = {"n": len(statistics_NS), "higher_is_better": metric.higher_is_better}
        found[name] = dict(zip(("value", "low", "high"), numbers)) | n
    return found


def _correct(stored: dict) -> list[float]:
    return [stored["is_correct"], 1]


def _same_letter(stored: dict) -> list[float]:
    return [stored["pred"].strip().lower() == stored["answer"].strip().lower(), 1]


def _ratio(metric: str, numerator: str, denominator: str) -> StoredFigure:
    return StoredFigure(metric, lambda stored: [stored[numerator], stored[denominator]])


def _hallusion(stored: dict) -> list[float]:
    read = read_yes_no(stored["model_prediction"])
    return [read is not None and read == (str(stored["gt_answer"]) == "1"), 1]


def _hallusion_group(last: str) -> Callable[[dict], str]:
    return lambda stored: "_".join(str(stored[key]) for key in ("category", "subcategory", "set_id", last))


def _chair(stored: dict) -> list[float]:
    return chair_statistics(stored["pred"], stored["answer"])


def _pope(stored: dict) -> list[float]:
    return yes_no_statistics(stored["prediction"], stored["ground_truth"] == "yes")


LMMS_EVAL_FIGURES: dict[str, dict[str, StoredFigure]] = {
    **{name: {name: StoredFigure("accuracy", _same_letter)} for name in ("seed_image", "seed_video", "seed_all")},
    "pope_accuracy": {f"yes_no_{name}": StoredFigure(f"yes_no_{name}", _pope) for name in YES_NO},
    **{f"pope_{name}": {} for name in ("precision", "recall", "f1_score", "yes_ratio")},  # all in the line above
    "mmvp_accuracy": {"mmvp_accuracy": StoredFigure("accuracy", _correct)},
    "mmvp_pair_accuracy": {
        "mmvp_pair_accuracy": StoredFigure("accuracy", _correct, lambda stored: str(stored["pair_index"]))
    },
    "cv_bench_acc": {"cv_bench_acc": StoredFigure("accuracy", _correct)},
    "aAcc": {"aAcc": StoredFigure("accuracy", _hallusion)},
    "qAcc": {"qAcc": StoredFigure("accuracy", _hallusion, _hallusion_group("question_id"))},
    "fAcc": {"fAcc": StoredFigure("accuracy", _hallusion, _hallusion_group("figure_id"))},
    "coco_cap_chair_i": {name: StoredFigure(name, _chair) for name in ("chair_i", "chair_s", "chair_cover")},
    "coco_cap_chair_s": {},
    "coco_cap_recall": {},
    "amber_chair": {"amber_chair": _ratio("ratio_wrong", "chair_score", "chair_num")},
    "amber_cover": {"amber_cover": _ratio("ratio", "safe_cover_score", "safe_cover_num")},
    "amber_cog": {"amber_cog": _ratio("ratio_wrong", "hallu_cover_score", "hallu_cover_num")},
    "amber_hal": {
        "amber_hal": StoredFigure(
            "ratio_wrong",
            lambda stored: [stored["non_hallu_num"] - stored["non_hallu_score"], stored["non_hallu_num"]],
        )
    },
}
