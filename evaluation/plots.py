"""Plots of tables: each figure a point with its interval, the paper's figure beside it as a diamond."""

from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from granulon.hub.files import write_atomically

OURS, PAPER = "#1f4e8c", "#b5651d"


def draw_table(table, path: Path) -> list[Path]:
    """
    Write a table as PNG and PDF: a panel per column that has a figure, a line per entry.

    Returns:
        the files; none if no column has a figure.
    """
    names = list(dict.fromkeys((row.group, row.name) for row in table.rows))
    columns = range(len(table.columns))
    shown = [column for column in columns if any(row.figures[column].value is not None for row in table.rows)]
    if not shown:
        return []
    figure = Figure(figsize=(2.2 + 2.6 * len(shown), 1.2 + 0.28 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, column in zip(panels, shown):
        for row in table.rows:
            _draw_point(axes, names.index((row.group, row.name)), row.figures[column], row.paper)
        axes.set_title(table.columns[column], fontsize=9)
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(names)), [" ".join(filter(None, name)) for name in names], fontsize=8)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    if any(row.paper for row in table.rows):
        panels[0].plot([], [], "o", color=OURS, label="ours, 95% interval")
        panels[0].plot([], [], "D", color=PAPER, markerfacecolor="none", label="the paper's")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(table.title, fontsize=10)
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "pdf")]
    for file in files:
        write_atomically(file, partial(figure.savefig, dpi=150))
    return files


def _draw_point(axes, height: float, figure, paper: bool):
    if figure.value is None:
        style = {"fontsize": 6, "color": "gray", "va": "center", "transform": axes.get_yaxis_transform()}
        axes.text(0.02, height, figure.missing, **style)
    elif paper:
        axes.plot(figure.value, height, "D", color=PAPER, markerfacecolor="none", markersize=5)
    else:
        if figure.low is not None:
            axes.plot([figure.low, figure.high], [height, height], color=OURS, linewidth=1.5)
        axes.plot(figure.value, height, "o", color=OURS, markersize=4)
