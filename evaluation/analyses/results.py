"""Further figures of finished runs of granulon-evaluate: score per visual token, chosen level per type of question.

Everything is read from the runs' samples, each of which records its level and the number of image tokens read.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
from scipy.stats import entropy

from granulon.evaluation.matrix import largest_runs, read_samples
from granulon.evaluation.statistics import percentiles, resampled
from granulon.hub.text import markdown_table, with_interval
from modeling_granulon.configuration_granulon import DEFAULT_GRANULARITIES

from .files import COLOURS, FAINT, INK, MARKERS

KNOWN_LEVELS = [level["name"] for level in DEFAULT_GRANULARITIES]
# Columns of data sets that hold the type of a question, the most specific first.
TYPE_COLUMNS = (
    "question_type", "question_type_id", "kind", "task", "category", "subcategory", "type", "task_type",
)  # fmt: skip
MOST_TYPES = 8  # of one benchmark; the others are counted together
OTHER, ALL = "other", "all"


def finished_runs(output: str | Path, only: Sequence[str] = ()) -> list[dict]:
    """
    The largest finished run of each entry and task, with its samples under `samples_read`.

    Args:
        output: output folder of granulon-evaluate.
        only: names of entries; all by default.

    Raises:
        ValueError: no finished run, or none of a name.
    """
    found = largest_runs(Path(output), only)
    return [result | {"samples_read": read_samples(Path(result["folder"]))} for result in found]


def accuracy_against_tokens(runs: list[dict]) -> dict:
    """
    One point for each run: visual tokens per sample, and the first metric of its task of which more is better.

    Args:
        runs: of `finished_runs`.

    Returns:
        dict: `points`, each with task, group, entry, view, granularity, metric, samples, and as (value, low, high)
        `tokens`, `pixel_tokens`, `semantic_tokens` and `value`; `left_out`, the reason for each run without a point.

    Raises:
        ValueError: no run has both.
    """
    points, left_out = [], {}
    for run in runs:
        metrics = run["metrics"].items()
        usable = [name for name, entry in metrics if entry.get("higher_is_better") and entry["value"] is not None]
        counted = [sample for sample in run["samples_read"] if sample.get("view")]
        if not usable or not counted:
            left_out[_run_name(run)] = "its samples count no visual tokens" if usable else "it has no score"
            continue
        score = run["metrics"][usable[0]]
        points.append(
            {
                "task": run["task"]["name"],
                **_settings(run),
                "metric": usable[0],
                "samples": len(counted),
                **_token_means(counted),
                "value": [score["value"], score["low"], score["high"]],
            }
        )
    if not points:
        raise ValueError(f"no run has a score and visual tokens: {left_out}")
    return {"points": points, "left_out": left_out}


def _settings(run: dict) -> dict:
    """The entry of a run, and how it was evaluated."""
    entry, level = run["entry"], run["entry"].get("granularity")
    return {
        "group": entry.get("group", ""),
        "entry": entry["name"],
        "view": entry.get("view", "full"),
        "granularity": entry.get("overrides", {}).get("controller") if level is None else level,
    }


def _run_name(run: dict) -> str:
    return f"{run['run']} ({_view_and_level(_settings(run))})"


def _view_and_level(settings: dict) -> str:
    return ", ".join(str(settings[key]) for key in ("view", "granularity") if settings[key] is not None)


def _left_out_notes(left_out: dict[str, str]) -> list[str]:
    reasons = defaultdict(list)
    for name, reason in left_out.items():
        reasons[reason].append(name)
    return [f"Left out, since {reason}: {'; '.join(names)}." for reason, names in reasons.items()]


def _token_means(samples: list[dict]) -> dict[str, tuple[float, float, float]]:
    """Mean visual tokens of samples, with bootstrap intervals."""
    counts_N2 = np.array([[sample["pixel_tokens"], sample["semantic_tokens"]] for sample in samples], dtype=float)
    counts_N3 = np.column_stack([counts_N2.sum(1), counts_N2])
    drawn_R3 = resampled(lambda sums_R3: sums_R3 / len(samples), counts_N3)
    names = ("tokens", "pixel_tokens", "semantic_tokens")
    return {
        name: (float(counts_N3[:, column].mean()), *percentiles(drawn_R3[:, column]))
        for column, name in enumerate(names)
    }


def tokens_markdown(report: dict) -> str:
    """A table with a row for each run, by task and number of tokens."""
    header = ["task", "model", "entry", "view", "level", "samples"]
    header += ["visual tokens", "pixel", "semantic", "metric", "value"]
    rows = [
        [
            *(point["task"], point["group"], point["entry"], point["view"]),
            "chosen" if point["granularity"] is None else point["granularity"],
            point["samples"],
            with_interval(*point["tokens"], digits=1),
            *(f"{point[name][0]:.1f}" for name in ("pixel_tokens", "semantic_tokens")),
            point["metric"],
            with_interval(*point["value"], digits=1),
        ]
        for point in sorted(report["points"], key=lambda point: (point["task"], point["tokens"][0]))
    ]
    notes = _left_out_notes(report["left_out"])
    return "\n\n".join(["95% bootstrap intervals over samples.", markdown_table(header, rows, 5), *notes])


def draw_tokens(report: dict) -> Figure:
    """A panel per task: score against visual tokens, a colour and a marker for each entry."""
    points = report["points"]
    tasks = sorted({point["task"] for point in points})
    names = _names(points)
    labels = list(dict.fromkeys(names))
    across = min(3, len(tasks))
    down = ceil(len(tasks) / across)
    figure = Figure(
        figsize=(3.5 * across + 0.4, 2.9 * down + 0.6 + 0.22 * ceil(len(labels) / 3)), layout="constrained"
    )
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    for axes, task in zip(panels, tasks):
        shown = [(point, labels.index(name)) for point, name in zip(points, names) if point["task"] == task]
        for point, number in shown:
            _draw_point(axes, point, number)
        metric = shown[0][0]["metric"]
        _set_scales(axes, [point for point, _ in shown])
        axes.set_title(task, fontsize=9)
        axes.set_ylabel(metric if metric == "bleu" else f"{metric} (%)", fontsize=8)
        axes.set_xlabel("visual tokens per sample", fontsize=8)
        axes.tick_params(labelsize=7.5)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for number, label in enumerate(labels):
        panels[0].plot([], [], **_marker_style(number), linestyle="none", label=label)
    figure.legend(loc="outside lower center", ncols=min(3, len(labels)), fontsize=8, frameon=False)
    figure.suptitle("Score against visual tokens, with 95% intervals", fontsize=10)
    return figure


def _names(entries: list[dict]) -> list[str]:
    """The name of each entry, with view and level where others have the same name."""
    settings = {(entry["group"], entry["entry"], _view_and_level(entry)) for entry in entries}
    count = Counter(key[:2] for key in settings)
    named = []
    for entry in entries:
        key = entry["group"], entry["entry"]
        name = " ".join(filter(None, key))
        named.append(name if count[key] == 1 else f"{name}, {_view_and_level(entry)}")
    return named


def _set_scales(axes, points: list[dict]):
    """Tokens on a logarithmic axis where they differ by more than four times; at least five points of score."""
    tokens = [point["tokens"][0] for point in points]
    if min(tokens) > 0 and max(tokens) > 4 * min(tokens):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.margins(x=0.08)
    low, high = axes.get_ylim()
    margin = max(0, 5 - (high - low)) / 2
    axes.set_ylim(low - margin, high + margin)


def _marker_style(number: int) -> dict:
    marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
    style = {"marker": marker, "markersize": 6.5, "markeredgecolor": INK, "markeredgewidth": 0.5}
    return style | {"color": COLOURS[number % len(COLOURS)]}


def _draw_point(axes, point: dict, number: int):
    errors = {}
    for key, direction in (("value", "yerr"), ("tokens", "xerr")):
        middle, low, high = point[key]
        if low is not None and np.isfinite([low, high]).all():
            errors[direction] = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
    style = {"ecolor": INK, "elinewidth": 0.8, "capsize": 2, **_marker_style(number)}
    axes.errorbar(point["tokens"][0], point["value"][0], **errors, **style)


def chosen_levels(runs: list[dict]) -> dict:
    """
    How often each level was chosen, by entry, benchmark and type of question.

    A type is what the data set says (`TYPE_COLUMNS`), else the first two words of the question. Entries whose level
    was fixed or random are left out.

    Returns:
        dict: `levels`, from coarse to fine; `counts`, each with group, entry, task, type ("all" for all of them),
        `types_from`, samples, `count` and `share` by level, and `entropy` in bits; `left_out`, the reason for each
        run that was left out.

    Raises:
        ValueError: no run has a level that the model chose.
    """
    counts, left_out, tokens = [], {}, defaultdict(list)
    for run in runs:
        samples = [sample for sample in run["samples_read"] if sample.get("granularity")]
        level = _settings(run)["granularity"]
        if not samples or level not in (None, "learned"):
            reason = f"its level is set ({level})" if samples else "its samples have no level: no image, or no levels"
            left_out[_run_name(run)] = reason
            continue
        for sample in samples:
            tokens[sample["granularity"]].append(sample.get("semantic_tokens") or 0)
        counts += _count_levels(run, samples)
    if not counts:
        raise ValueError(f"no run has a level that the model chose: {left_out}")

    def from_coarse_to_fine(name):
        known = KNOWN_LEVELS.index(name) if name in KNOWN_LEVELS else len(KNOWN_LEVELS)
        return known, np.mean(tokens[name]), name

    levels = sorted(tokens, key=from_coarse_to_fine)
    return {"levels": levels, "counts": [_with_shares(entry, levels) for entry in counts], "left_out": left_out}


def _count_levels(run: dict, samples: list[dict]) -> list[dict]:
    """One entry for all samples of a run, and one for each type of question, the most frequent first."""
    source, types = question_types(samples)
    common = [name for name, _ in Counter(types).most_common(MOST_TYPES)]
    types = [name if name in common else OTHER for name in types]
    names = list(dict.fromkeys([*common, *([OTHER] if OTHER in types else [])]))
    return [
        {
            **_settings(run),
            "task": run["task"]["name"],
            "type": name,
            "types_from": source,
            "count": Counter(sample["granularity"] for sample, own in zip(samples, types) if name in (ALL, own)),
        }
        for name in ([ALL, *names] if len(names) > 1 else [ALL])
    ]


def question_types(samples: list[dict]) -> tuple[str, list[str]]:
    """The column that types were read from (or "first words"), and the type of each sample's question."""
    docs = [sample.get("doc") or {} for sample in samples]
    for column in TYPE_COLUMNS:
        values = [doc.get(column) for doc in docs]
        if all(isinstance(value, (str, int)) and value != "" for value in values) and len(set(values)) > 1:
            return column, [str(value) for value in values]
    types = []
    for doc, sample in zip(docs, samples):
        questions = [doc.get("question"), doc.get("Question"), sample.get("question"), ""]
        question = next(question for question in questions if isinstance(question, str))
        types.append(" ".join(re.findall(r"\w+", question.lower())[:2]) or "(none)")
    return "first words", types


def _with_shares(entry: dict, levels: list[str]) -> dict:
    count = {level: entry["count"][level] for level in levels}
    total = sum(count.values())
    shares = {level: number / total for level, number in count.items()}
    bits = float(entropy(list(count.values()), base=2))
    return entry | {"samples": total, "count": count, "share": shares, "entropy": bits}


def levels_markdown(report: dict) -> str:
    """A table with a row for each entry, benchmark and type of question."""
    header = ["model", "entry", "view", "task", "questions", "samples", *report["levels"], "entropy (bits)"]
    rows = [
        [
            *(entry["group"], entry["entry"], entry["view"], entry["task"], entry["type"]),
            entry["samples"],
            *(f"{entry['count'][level]} ({entry['share'][level]:.0%})" for level in report["levels"]),
            f"{entry['entropy']:.2f}",
        ]
        for entry in report["counts"]
    ]
    sources = {entry["task"]: entry["types_from"] for entry in report["counts"]}
    sources = "; ".join(f"{task}: {source}" for task, source in sources.items())
    note = f"Types of questions come from: {sources}. "
    note += f"The entropy is {np.log2(len(report['levels'])):.2f} bits where all levels are chosen equally often."
    return "\n\n".join([note, markdown_table(header, rows, 5), *_left_out_notes(report["left_out"])])


def draw_levels(report: dict) -> Figure:
    """
    Stacked bars with the levels' shares, one for each benchmark.

    For a single entry, a bar for each type of question is below its benchmark's; for several there is no room.
    """
    names = dict(zip(map(id, report["counts"]), _names(report["counts"])))
    several = len(set(names.values())) > 1
    counts = [entry for entry in report["counts"] if entry["type"] == ALL or not several]
    figure = Figure(figsize=(8, 1.3 + 0.27 * len(counts)), layout="constrained")
    axes = figure.subplots()
    # From light for coarse to dark for fine, readable without colour too.
    colours = dict(zip(report["levels"], colormaps["Blues"](np.linspace(0.2, 0.95, len(report["levels"])))))
    bars = []
    for height, entry in enumerate(counts):
        _draw_bar(axes, height, entry, colours)
        name = f"{entry['task']} ({names[id(entry)]})" if several else entry["task"]
        bars.append(name if entry["type"] == ALL else entry["type"][:40])
    axes.set_yticks(range(len(counts)), bars, fontsize=8)
    for label, entry in zip(axes.get_yticklabels(), counts):
        label.set_color(INK if entry["type"] == ALL else FAINT)
        label.set_fontweight("bold" if entry["type"] == ALL else "normal")
    axes.set_ylim(len(counts) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"], fontsize=8)
    axes.set_xlabel("share of the questions (%)", fontsize=8)
    axes.text(1.015, -0.6, "number, entropy (bits)", fontsize=7.5, color=FAINT, va="bottom")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    for level, colour in colours.items():
        axes.barh([0], [0], color=colour, label=level)
    figure.legend(loc="outside lower center", ncols=len(colours), fontsize=8, frameon=False)
    figure.suptitle("Level chosen, by benchmark and type of question", fontsize=10)
    return figure


def _draw_bar(axes, height: int, entry: dict, colours: dict[str, np.ndarray]):
    left = 0.0
    for level, colour in colours.items():
        share = entry["share"][level]
        axes.barh(height, share, left=left, height=0.78, color=colour, edgecolor="white", linewidth=0.8)
        if share > 0.06:
            style = {"fontsize": 7, "color": "white" if colour[0] < 0.4 else INK, "ha": "center", "va": "center"}
            axes.text(left + share / 2, height, f"{share:.0%}", **style)
        left += share
    axes.text(1.015, height, f"{entry['samples']:>5}   {entry['entropy']:.2f}", va="center", fontsize=7.5)
