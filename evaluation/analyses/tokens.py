"""Score of finished runs of granulon-evaluate against the visual tokens that their samples record."""

from math import ceil

import numpy as np
from matplotlib.figure import Figure

from granulon.evaluation.statistics import percentiles, resampled
from granulon.hub.text import markdown_table, with_interval

from .files import COLOURS, MARKERS, left_out_notes, run_name, settings_of


def accuracy_against_tokens(runs: list[dict]) -> dict:
    """
    One point for each run: visual tokens per sample, and the first metric of its task of which more is better.

    Args:
        runs: of `files.finished_runs`.

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
            left_out[run_name(run)] = "its samples count no visual tokens" if usable else "it has no score"
            continue
        score = run["metrics"][usable[0]]
        points.append(
            {
                "task": run["task"]["name"],
                **settings_of(run),
                "metric": usable[0],
                "samples": len(counted),
                **_token_means(counted),
                "value": [score["value"], score["low"], score["high"]],
            }
        )
    if not points:
        raise ValueError(f"no run has a score and visual tokens: {left_out}")
    return {"points": points, "left_out": left_out}


def _token_means(samples: list[dict]) -> dict[str, tuple[float, float, float]]:
    """Mean visual tokens of samples, with bootstrap intervals."""
    counts_N2 = np.array([[sample["pixel_tokens"], sample["semantic_tokens"]] for sample in samples], dtype=float)
    counts_N3 = np.column_stack([counts_N2.sum(1), counts_N2])
    drawn_R3 = resampled(lambda sums_R3: sums_R3 / len(samples), counts_N3)
    return {
        name: (float(counts_N3[:, column].mean()), *percentiles(drawn_R3[:, column]))
        for column, name in enumerate(("tokens", "pixel_tokens", "semantic_tokens"))
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
    notes = left_out_notes(report["left_out"])
    return "\n\n".join(["95% bootstrap intervals over samples.", markdown_table(header, rows, 5), *notes])


def draw_tokens(report: dict) -> Figure:
    """A panel per task: score against visual tokens, a colour and a marker for each entry, view and level."""
    tasks = sorted({point["task"] for point in report["points"]})
    across = min(3, len(tasks))
    down = ceil(len(tasks) / across)
    figure = Figure(figsize=(3.5 * across + 0.4, 3.2 * down + 0.8), layout="constrained")
    panels = dict(zip(tasks, figure.subplots(down, across, squeeze=False).flatten()))
    styles = {}
    for point in report["points"]:
        axes, name = panels[point["task"]], run_name(point)
        number = styles.setdefault(name, len(styles))
        # The marker moves on by one more each time that the colours begin again.
        marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": marker, "label": name}
        (score, *score_range), (tokens, *tokens_range) = point["value"], point["tokens"]
        axes.plot(tokens, score, linestyle="none", **style)
        if None not in score_range:
            axes.plot([tokens] * 2, score_range, color=style["color"], linewidth=0.8)
        axes.plot(tokens_range, [score] * 2, color=style["color"], linewidth=0.8)
        axes.set_title(point["task"], fontsize=9)
        axes.set_ylabel(point["metric"] if point["metric"] == "bleu" else f"{point['metric']} (%)", fontsize=8)
        axes.set_xlabel("visual tokens per sample", fontsize=8)
        axes.set_xscale("symlog")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in figure.axes[len(tasks) :]:
        axes.set_visible(False)
    shown = {}
    for axes in panels.values():
        shown |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(
        shown.values(), shown, loc="outside lower center", ncols=min(3, len(shown)), fontsize=8, frameon=False
    )
    figure.suptitle("Score against visual tokens, with 95% intervals", fontsize=10)
    return figure
