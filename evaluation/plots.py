"""A table as a picture: every figure a point with its interval, the paper's beside it as a diamond."""

from pathlib import Path

from matplotlib.figure import Figure

OURS, THEIRS = "#1f4e8c", "#b5651d"


def draw_table(table, path: Path) -> list[Path]:
    """Write PNG and PDF with a panel per column and a line per row; none of a column, or table, without a figure."""
    names = list(dict.fromkeys((line.group, _plain_name(line)) for line in table.lines))
    columns = range(len(table.columns))
    shown = [place for place in columns if any(line.figures[place].value is not None for line in table.lines)]
    if not shown or not names:
        return []
    figure = Figure(figsize=(2.2 + 2.6 * len(shown), 1.2 + 0.28 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, place in zip(panels, shown):
        for line in table.lines:
            _draw_point(axes, names.index((line.group, _plain_name(line))), line.figures[place], line.paper)
        axes.set_title(table.columns[place], fontsize=9)
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(names)), [" ".join(filter(None, name)) for name in names], fontsize=8)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    if any(line.paper for line in table.lines):
        panels[0].plot([], [], "o", color=OURS, label="ours, 95% interval")
        panels[0].plot([], [], "D", color=THEIRS, markerfacecolor="none", label="the paper's")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(table.title, fontsize=10)
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "pdf")]
    for file in files:
        draft = file.with_name(f"{file.name}.tmp")
        figure.savefig(draft, format=file.suffix[1:], dpi=150)
        draft.replace(file)
    return files


def _draw_point(axes, height: float, entry, paper: bool):
    if entry.value is None:
        style = {"fontsize": 6, "color": "gray", "va": "center", "transform": axes.get_yaxis_transform()}
        axes.text(0.02, height, entry.missing, **style)
        return
    if paper:
        axes.plot(entry.value, height, "D", color=THEIRS, markerfacecolor="none", markersize=5)
        return
    if entry.low is not None:
        axes.plot([entry.low, entry.high], [height, height], color=OURS, linewidth=1.5)
    axes.plot(entry.value, height, "o", color=OURS, markersize=4)


def _plain_name(line) -> str:
    """The paper's line stands at the height of ours."""
    return line.name.removesuffix(" (paper)") if line.paper else line.name
