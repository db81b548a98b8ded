"""What finished cells of granulon-evaluate tell beside their figures: accuracy per visual token, levels per question.

Nothing is run again: all of it is read from the samples, each of which carries its level and how many image tokens
were read for it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from math import log2
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from granulon.evaluation.statistics import percentiles, resampled
from granulon.evaluation.matrix import largest_runs, read_results, read_samples
from modeling_granulon.configuration_granulon import DEFAULT_GRANULARITIES

from .files import COLOURS, FAINT, INK, LEVEL_COLOURS, MARKS, ranged, table

KNOWN_LEVELS = [entry["name"] for entry in DEFAULT_GRANULARITIES]
# Columns that say what kind of question it is, the most telling first.
TYPE_COLUMNS = (
    "question_type", "question_type_id", "kind", "task", "category", "subcategory", "type", "task_type",
)  # fmt: skip
MOST_TYPES = 8  # of one benchmark; the rest is shown together
OTHER, ALL = "other", "all"


def finished_cells(output: str | Path, only: Sequence[str] = ()) -> list[dict]:
    """
    The finished cell of most samples of each row (as it is called and asked) and task, with its `samples_read`.

    Args:
        only: rows of these names; all by default.

    Raises:
        ValueError: there is none, or no row of a name.
    """
    found = largest_runs(read_results(Path(output)))
    if not found:
        raise ValueError(f"{output} has no finished cells; run granulon-evaluate --output {output} first")
    rows = {result["entry"]["name"] for result in found}
    if missing := set(only) - rows:
        raise ValueError(f"{output} has no finished cell of the row {sorted(missing)}; it has {sorted(rows)}")
    wanted = [result for result in found if not only or result["entry"]["name"] in only]
    return [result | {"samples_read": read_samples(Path(result["folder"]))} for result in wanted]


def accuracy_against_tokens(cells: list[dict], metrics: dict[str, str] | None = None, seed: int = 0) -> dict:
    """
    One point for each cell: visual tokens per sample, and the figure of its task.

    Args:
        cells: of `finished_cells`.
        metrics: by task, the figure to show; by default a task's first one of which more is better.

    Returns:
        dict: `points`, each with task, group, row, view, granularity, metric, samples, `tokens`, `pixel_tokens`,
        `semantic_tokens` and `value`, all four (value, low, high); `left_out`, cells without a point: why.

    Raises:
        ValueError: no cell has both, or a figure that a task does not have.
    """
    points, left_out = [], {}
    for cell in cells:
        metric, reason = _shown_metric(cell, (metrics or {}).get(cell["task"]["name"]))
        counted = [sample for sample in cell["samples_read"] if sample.get("view")]
        if not counted:
            reason = "its samples count no visual tokens"
        if reason:
            left_out[_cell_name(cell)] = reason
            continue
        figure = cell["metrics"][metric]
        points.append(
            {
                "task": cell["task"]["name"],
                **_told(cell),
                "metric": metric,
                "samples": len(counted),
                **_token_means(counted, seed),
                "value": [figure["value"], figure["low"], figure["high"]],
            }
        )
    if not points:
        raise ValueError(f"no cell has a figure and visual tokens: {left_out}")
    return {"points": points, "left_out": left_out}


def _shown_metric(cell: dict, wanted: str | None) -> tuple[str | None, str | None]:
    """The figure to show, or why there is none."""
    task, found = cell["task"]["name"], cell["metrics"]
    if wanted is not None and wanted not in found:
        raise ValueError(f"{task} has no figure {wanted}; it has {', '.join(found) or 'none'}")
    usable = [name for name, entry in found.items() if entry.get("higher_is_better") and entry["value"] is not None]
    metric = wanted or (usable[0] if usable else None)
    if metric is None or found[metric]["value"] is None:
        return None, "it has no figure"
    return metric, None


def _cell_name(cell: dict) -> str:
    """A cell and how it was asked, since cells of one model are called alike."""
    told = _told(cell)
    return f"{cell['run']} ({_how(told['view'], told['granularity'])})"


def _how(view: str, level) -> str:
    return view if level is None else f"{view}, {level}"


def _left_out(cells: dict[str, str]) -> list[str]:
    reasons = defaultdict(list)
    for name, reason in cells.items():
        reasons[reason].append(name)
    return [f"Left out, since {reason}: {'; '.join(names)}." for reason, names in reasons.items()]


def _told(cell: dict) -> dict:
    """What a row is called and how it is asked."""
    row = cell["entry"]
    level = row.get("granularity")
    return {
        "group": row.get("group", ""),
        "row": row["name"],
        "view": row.get("view", "full"),
        "granularity": row.get("overrides", {}).get("controller") if level is None else level,
    }


def _token_means(samples: list[dict], seed: int) -> dict[str, tuple[float, float, float]]:
    """Mean visual tokens of samples, as they count them, with bootstrap intervals."""
    counts_N2 = np.array([[sample["pixel_tokens"], sample["semantic_tokens"]] for sample in samples], dtype=float)
    counts_N3 = np.column_stack([counts_N2.sum(1), counts_N2])
    drawn_R3 = resampled(lambda sums_R3: sums_R3 / len(samples), counts_N3, seed)
    names = ("tokens", "pixel_tokens", "semantic_tokens")
    return {
        name: (float(counts_N3[:, place].mean()), *percentiles(drawn_R3[:, place])) for place, name in enumerate(names)
    }


def tokens_markdown(report: dict) -> str:
    header = [
        "task",
        "model",
        "row",
        "view",
        "level",
        "samples",
        "visual tokens",
        "pixel",
        "semantic",
        "figure",
        "value",
    ]
    lines = [
        [
            *(point["task"], point["group"], point["row"], point["view"]),
            "chosen" if point["granularity"] is None else point["granularity"],
            point["samples"],
            ranged(*point["tokens"], digits=1),
            *(f"{point[name][0]:.1f}" for name in ("pixel_tokens", "semantic_tokens")),
            point["metric"],
            ranged(*point["value"], digits=1),
        ]
        for point in sorted(report["points"], key=lambda point: (point["task"], point["tokens"][0]))
    ]
    notes = _left_out(report["left_out"])
    return "\n\n".join(["95% bootstrap intervals over samples.", table(header, lines, 5), *notes])


def draw_tokens(report: dict) -> Figure:
    """A panel per task: figure against visual tokens, a colour and a mark for each row."""
    points = report["points"]
    tasks = sorted({point["task"] for point in points})
    rows = list(dict.fromkeys(_asked(point) for point in points))
    named = {asked: _row_name(asked, rows) for asked in rows}
    across = min(3, len(tasks))
    down = -(-len(tasks) // across)
    figure = Figure(figsize=(3.5 * across + 0.4, 2.9 * down + 0.6 + 0.22 * -(-len(rows) // 3)), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    for axes, task in zip(panels, tasks):
        own = [point for point in points if point["task"] == task]
        for point in own:
            _draw_point(axes, point, rows.index(_asked(point)))
        _scale(axes, own)
        axes.set_title(task, fontsize=9)
        axes.set_ylabel(f"{own[0]['metric']} (%)" if own[0]["metric"] != "bleu" else "bleu", fontsize=8)
        axes.set_xlabel("visual tokens per sample", fontsize=8)
        axes.tick_params(labelsize=7.5)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for place, row in enumerate(rows):
        panels[0].plot([], [], **_look(place), linestyle="none", label=named[row])
    figure.legend(loc="outside lower center", ncols=min(3, len(rows)), fontsize=8, frameon=False)
    figure.suptitle("What visual tokens buy: figure with its 95% interval", fontsize=10)
    return figure


def _asked(entry: dict) -> tuple:
    return entry["group"], entry["row"], entry["view"], entry["granularity"]


def _row_name(asked: tuple, rows: list[tuple]) -> str:
    """A row's name, with its view and level where others are called alike."""
    name = " ".join(filter(None, asked[:2]))
    if sum(other[:2] == asked[:2] for other in rows) == 1:
        return name
    return f"{name}, {_how(*asked[2:])}"


def _scale(axes, points: list[dict]):
    """Tokens on a logarithmic axis where they differ much; values not closer than a few per cent."""
    spread = [point["tokens"][0] for point in points]
    if min(spread) > 0 and max(spread) > 4 * min(spread):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
    low, high = axes.get_ylim()
    axes.set_ylim(low - max(0, 5 - (high - low)) / 2, high + max(0, 5 - (high - low)) / 2)


def _look(place: int) -> dict:
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKS[(place + place // len(COLOURS)) % len(MARKS)],
        "markeredgecolor": INK,
        "markeredgewidth": 0.5,
        "markersize": 6.5,
    }


def _draw_point(axes, point: dict, place: int):
    look = _look(place)
    for key, along in (("value", "y"), ("tokens", "x")):
        middle, low, high = point[key]
        if low is not None and np.isfinite([low, high]).all():
            reach = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
            axes.errorbar(
                point["tokens"][0],
                point["value"][0],
                **{f"{along}err": reach},
                color=look["color"],
                linewidth=1.2,
                alpha=0.8,
                capsize=2,
            )
    axes.plot(point["tokens"][0], point["value"][0], **look)


def chosen_levels(cells: list[dict]) -> dict:
    """
    How often each level was chosen, by row, benchmark and type of question.

    A type is what the data set says (`TYPE_COLUMNS`), else the first two words of the question. Rows whose level was
    not chosen by the model (a fixed or random one) are left out.

    Returns:
        dict: `levels`, from coarse to fine; `counts`, each with group, row, task, type ("all" for all of them),
        `types_from`, samples, `count` and `share` by level, and `entropy` in bits; `left_out`, cells: why.

    Raises:
        ValueError: no cell has a level that was chosen.
    """
    counts, left_out, tokens = [], {}, defaultdict(list)
    for cell in cells:
        samples = [sample for sample in cell["samples_read"] if sample.get("granularity")]
        forced = _told(cell)["granularity"]
        if not samples or forced not in (None, "learned"):
            left_out[_cell_name(cell)] = (
                f"its level is set ({forced})" if samples else "its samples have no level: no image, or no levels"
            )
            continue
        for sample in samples:
            tokens[sample["granularity"]].append(sample.get("semantic_tokens") or 0)
        counts += _counted(cell, samples)
    if not counts:
        raise ValueError(f"no cell has a level that the model chose: {left_out}")
    levels = sorted(tokens, key=lambda name: (_known_place(name), np.mean(tokens[name]), name))
    return {"levels": levels, "counts": [_with_shares(entry, levels) for entry in counts], "left_out": left_out}


def _known_place(level: str) -> int:
    return KNOWN_LEVELS.index(level) if level in KNOWN_LEVELS else len(KNOWN_LEVELS)


def _counted(cell: dict, samples: list[dict]) -> list[dict]:
    """One entry for all samples of a cell, and one for each type of question, the commonest first."""
    source, types = question_types(samples)
    common = [name for name, _ in Counter(types).most_common(MOST_TYPES)]
    types = [name if name in common else OTHER for name in types]
    names = [ALL, *common, *([OTHER] if OTHER in types and OTHER not in common else [])]
    return [
        {
            **_told(cell),
            "task": cell["task"]["name"],
            "type": name,
            "types_from": source,
            "count": Counter(sample["granularity"] for sample, own in zip(samples, types) if name in (ALL, own)),
        }
        for name in (names if len(names) > 2 else [ALL])
    ]


def question_types(samples: list[dict]) -> tuple[str, list[str]]:
    """Where types were read from, and the type of each sample's question."""
    docs = [sample.get("doc") or {} for sample in samples]
    for column in TYPE_COLUMNS:
        values = [doc.get(column) for doc in docs]
        if all(isinstance(value, (str, int)) and value != "" for value in values) and len(set(values)) > 1:
            return column, [str(value) for value in values]
    questions = [
        next((doc[name] for name in ("question", "Question") if isinstance(doc.get(name), str)), None)
        or str(sample.get("question", ""))
        for doc, sample in zip(docs, samples)
    ]
    return "first words", [" ".join(re.findall(r"\w+", question.lower())[:2]) or "(none)" for question in questions]


def entropy(shares) -> float:
    """Of a distribution, in bits: 0 where one level is always chosen, log2 of their number where all are alike."""
    return float(-sum(share * log2(share) for share in shares if share > 0)) + 0.0


def _with_shares(entry: dict, levels: list[str]) -> dict:
    total = sum(entry["count"].values())
    shares = {level: entry["count"][level] / total for level in levels}
    count = {level: entry["count"][level] for level in levels}
    return entry | {"samples": total, "count": count, "share": shares, "entropy": entropy(shares.values())}


def levels_markdown(report: dict) -> str:
    header = ["model", "row", "view", "task", "questions", "samples", *report["levels"], "entropy (bits)"]
    lines = [
        [
            *(entry["group"], entry["row"], entry["view"], entry["task"], entry["type"]),
            entry["samples"],
            *(f"{entry['count'][level]} ({entry['share'][level]:.0%})" for level in report["levels"]),
            f"{entry['entropy']:.2f}",
        ]
        for entry in report["counts"]
    ]
    sources = {entry["task"]: entry["types_from"] for entry in report["counts"]}
    told = "; ".join(f"{task}: {source}" for task, source in sources.items())
    most = log2(len(report["levels"])) if report["levels"] else 0
    notes = _left_out(report["left_out"])
    first = f"Types of questions come from: {told}. The entropy is {most:.2f} bits where all levels are chosen alike."
    return "\n\n".join([first, table(header, lines, 5), *notes])


def draw_levels(report: dict) -> Figure:
    """
    Stacked bars of the levels' shares, one for each benchmark.

    Of one row alone, a bar for each type of question stands below its benchmark's; of several rows, there is no room.
    """
    levels, counts = report["levels"], report["counts"]
    rows = list(dict.fromkeys(_asked(entry) for entry in counts))
    several = len(rows) > 1
    counts = [entry for entry in counts if entry["type"] == ALL or not several]
    figure = Figure(figsize=(8, 1.3 + 0.27 * len(counts)), layout="constrained")
    axes = figure.subplots()
    colours = _level_colours(len(levels))
    for line, entry in enumerate(counts):
        left = 0.0
        for level, colour in zip(levels, colours):
            share = entry["share"][level]
            axes.barh(line, share, left=left, height=0.78, color=colour, edgecolor="white", linewidth=0.8)
            if share > 0.06:
                dark = sum(int(colour[place : place + 2], 16) for place in (1, 3, 5)) < 380
                axes.text(
                    left + share / 2,
                    line,
                    f"{share:.0%}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else INK,
                )
            left += share
        axes.text(1.015, line, f"{entry['samples']:>5}   {entry['entropy']:.2f}", va="center", fontsize=7.5)
    names = [_bar_name(entry, rows) for entry in counts]
    axes.set_yticks(range(len(counts)), names, fontsize=8)
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
    for level, colour in zip(levels, colours):
        axes.barh([0], [0], color=colour, label=level)
    figure.legend(loc="outside lower center", ncols=len(levels), fontsize=8, frameon=False)
    figure.suptitle("Level chosen, by benchmark and type of question", fontsize=10)
    return figure


def _bar_name(entry: dict, rows: list[tuple]) -> str:
    if entry["type"] != ALL:
        return entry["type"][:40]
    return f"{entry['task']} ({_row_name(_asked(entry), rows)})" if len(rows) > 1 else entry["task"]


def _level_colours(count: int) -> list[str]:
    """Light for coarse, dark for fine; more levels than shades begin again."""
    if count <= len(LEVEL_COLOURS):
        places = np.linspace(0, len(LEVEL_COLOURS) - 1, count).round().astype(int) if count > 1 else [1]
        return [LEVEL_COLOURS[place] for place in places]
    return [LEVEL_COLOURS[place % len(LEVEL_COLOURS)] for place in range(count)]
