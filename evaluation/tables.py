"""Tables of finished runs, in Markdown and LaTeX, with the paper's figures beside ours, intervals and paired tests.

A figure is a value with its 95% bootstrap interval. A table row marked "(paper)" holds the paper's own figures. A run
that was not made is shown as such. If a table names an entry to compare with, its differences to the others of its
group are tested on the same samples: McNemar's exact test for right-or-wrong figures, else random swaps. These
are the planned comparisons of a column; the p-values of a column are corrected together by Holm's method.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import yaml

from granulon.hub.files import write_atomically
from granulon.hub.text import markdown_table, with_interval

from .matrix import Entry, Matrix, Settings, read_results, read_samples
from .metrics import BERTSCORE, JUDGED, METRICS
from .scoring import metric_of, units
from .statistics import FEWEST, holm, mcnemar, paired, percentiles, resampled

PAPER = Path(__file__).with_name("paper_tables.yaml")
UNDEFINED = "undefined"  # such as the precision of a model that never says yes
NOT_RUN, NOT_COMPUTED, NOT_JUDGED, UNKNOWN = "not run", "not computed", "not judged", "no such figure"
TABLE_KEYS = {"name", "title", "columns", "tasks", "groups", "compare", "paper", "statements"}
TEST_HEADER = ["", "against", "", "figure", "difference", "test", "samples", "p", "p corrected"]
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "λ": r"$\lambda$"}
)


@dataclass(frozen=True)
class Figure:
    """A value with its interval, or the reason why there is none."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    missing: str = ""
    best: bool = False

    def __str__(self) -> str:
        return with_interval(self.value, self.low, self.high) or self.missing


@dataclass(frozen=True)
class TableRow:
    """Our figures of an entry, or the paper's."""

    group: str
    name: str
    figures: tuple[Figure, ...]
    paper: bool = False


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    tests: tuple[dict, ...]
    notes: tuple[str, ...]
    judge: str | None = None

    @property
    def has_groups(self) -> bool:
        return any(row.group for row in self.rows)


class Results:
    """
    The finished runs of an output folder that have these settings, the newest of each entry and task.

    Attributes:
        other_settings: number of finished runs with other settings, by the names of the settings that differ.
        judge: the judge whose scores are shown, the one that scored most runs, of equal ones the newest: scores of
            two judges are not mixed.
    """

    def __init__(self, output: Path, settings: Settings):
        self.runs, self.other_settings, wanted = {}, Counter(), asdict(settings)
        for result in read_results(output):
            relevant = [name for name in wanted if name != "bertscore_model" or BERTSCORE in result["metrics"]]
            different = tuple(name for name in relevant if result["settings"].get(name) != wanted[name])
            if different:
                self.other_settings[different] += 1
                continue
            for entry in result["entries"]:
                self.runs[_entry_key(entry), result["task"]["name"]] = result
        scores = [scores for result in self.runs.values() for scores in result["judges"].values()]
        count = Counter(one["judge"] for one in scores)
        order = sorted(scores, key=lambda one: (count[one["judge"]], one["finished_at"]))
        self.judge = order[-1]["judge"] if order else None

    def result(self, entry: Entry, task: str) -> dict | None:
        return self.runs.get((_entry_key(asdict(entry)), task))

    def figure(self, entry: Entry, tasks: list[str], name: str) -> Figure:
        """A figure of an entry on a task, or its mean over several tasks."""
        results = [self.result(entry, task) for task in tasks]
        if None in results:
            return Figure(missing=NOT_RUN)
        found = [self.lookup(result, name) for result in results]
        if missing := next((one for one in found if isinstance(one, str)), None):
            return Figure(missing=missing)
        value = float(np.mean([one["value"] for one in found]))
        if len(found) == 1:
            return Figure(value, found[0]["low"], found[0]["high"])
        units_by_task = [self.units(result, name) for result in results]
        if not all(units_by_task):
            return Figure(value)
        metric = METRICS[metric_of(name)]
        draws_R = np.mean(
            [resampled(metric.value, _array(own), seed=number) for number, own in enumerate(units_by_task)], axis=0
        )
        return Figure(value, *percentiles(draws_R))

    def lookup(self, result: dict, name: str) -> dict | str:
        """A figure of a run (value, low, high, n), or the reason why there is none."""
        metrics = result["metrics"]
        if is_judged(name):
            scores = result["judges"].get(self.judge)
            if scores is None or scores["waiting"]:
                return NOT_JUDGED if scores is None else f"{scores['waiting']} not judged yet"
            metrics = scores["metrics"]
        if name not in metrics:
            return NOT_COMPUTED if name in result["not_computed"] else UNKNOWN
        return metrics[name] if metrics[name]["value"] is not None else UNDEFINED

    def units(self, result: dict, name: str) -> dict[str, list[float]]:
        """The statistics of a figure by unit (see `scoring.units`), from the run's samples or the judge's scores."""
        samples = result["judges"][self.judge]["samples"] if is_judged(name) else _samples(result["folder"])
        return units(samples, name)

    def compare(self, ours: Entry, theirs: Entry, task: str, name: str, comparisons: int = 1) -> dict | None:
        """A paired test of two entries, or why there is none (`not_tested`); None if one has no such figure.

        comparisons: tests that are corrected together.
        """
        pair = [self.result(entry, task) for entry in (ours, theirs)]
        if None in pair or any(isinstance(self.lookup(result, name), str) for result in pair):
            return None
        our_units, their_units = (self.units(result, name) for result in pair)
        if not our_units or not their_units:
            return None
        test = {"ours": ours.name, "theirs": theirs.name, "group": ours.group, "task": task, "figure": name}
        if our_units.keys() != their_units.keys():
            reason = (
                f"{ours.name} has {len(our_units)} samples and {theirs.name} {len(their_units)}, "
                f"{len(our_units.keys() & their_units.keys())} of them the same; run both on the same"
            )
            return {**test, "not_tested": reason}
        if (sample := _changed_sample(*pair)) is not None:
            return {**test, "not_tested": f"sample {sample} differs: the data changed between the two runs"}
        if len(our_units) < FEWEST:
            return {
                **test,
                "not_tested": f"{len(our_units)} samples: with fewer than {FEWEST} nothing can be concluded",
            }
        metric = METRICS[metric_of(name)]
        ours_NS, theirs_NS = _array(our_units), _array({unit: their_units[unit] for unit in our_units})
        test |= paired(metric.value, ours_NS, theirs_NS, comparisons=comparisons)
        if metric.proportion:
            test["p"] = mcnemar(ours_NS[:, 0], theirs_NS[:, 0])
        return {**test, "test": "McNemar" if metric.proportion else "swaps", "samples": len(ours_NS)}


def write_tables(output: Path, matrix: Matrix, results: Results) -> list[Path]:
    """Write every table of a matrix as Markdown, LaTeX and JSON; returns the files."""
    folder = output / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    paper = yaml.safe_load(PAPER.read_text())
    files = []
    for description in matrix.tables or [all_figures(matrix, results)]:
        table = make_table(description, matrix, results, paper)
        as_json = json.dumps(asdict(table), indent=1, ensure_ascii=False) + "\n"
        for suffix, text in ((".md", markdown(table)), (".tex", latex(table)), (".json", as_json)):
            write_atomically(folder / f"{table.name}{suffix}", text)
            files.append(folder / f"{table.name}{suffix}")
    return files


def all_figures(matrix: Matrix, results: Results) -> dict:
    """The description of a table with all figures, for a matrix that describes none."""
    columns = []
    for task in matrix.tasks:
        found = [result for entry in matrix.entries if (result := results.result(entry, task))]
        judged = [result["judges"][results.judge] for result in found if results.judge in result["judges"]]
        names = dict.fromkeys(name for one in [*found, *judged] for name in one["metrics"]) or {"": None}
        columns += [{"title": f"{task} {name}".strip(), "tasks": [task], "figure": name} for name in names]
    return {"name": "results", "title": "Results", "columns": columns}


def make_table(description: dict, matrix: Matrix, results: Results, paper: dict) -> Table:
    """
    Fill in a table.

    Args:
        description: `name`, `title` and `columns`, each with `title`, `figure`, `tasks` (the figure is the mean over
            them; by default the table's `tasks`) and `paper` (the column's name in the paper's table). Optional are
            `groups` (show only these), `compare` (the entry whose differences are tested), `paper` (the paper's
            table) and `statements` (of the paper, below the table).
        paper: content of paper_tables.yaml.

    Raises:
        ValueError: unknown keys.
    """
    if unknown := description.keys() - TABLE_KEYS:
        raise ValueError(
            f"the table {description.get('name')} has unknown keys {sorted(unknown)}; known are {sorted(TABLE_KEYS)}"
        )
    entries = [entry for entry in matrix.entries if entry.group in description.get("groups", [entry.group])]
    columns = [{"tasks": description.get("tasks"), **column} for column in description["columns"]]
    published = paper["tables"].get(description.get("paper"), {})
    rows = []
    for group in dict.fromkeys(entry.group for entry in entries):
        own = [entry for entry in entries if entry.group == group]
        figures = [[results.figure(entry, column["tasks"], column["figure"]) for column in columns] for entry in own]
        theirs = dict(published.get(group, {}))
        for entry, marked in zip(own, _mark_best(figures, columns)):
            rows.append(TableRow(group, entry.name, marked))
            if entry.name in theirs:
                rows.append(_paper_row(group, entry.name, theirs.pop(entry.name), columns))
        rows += [_paper_row(group, name, values, columns) for name, values in theirs.items()]
    return Table(
        description["name"],
        description["title"],
        tuple(column["title"] for column in columns),
        tuple(rows),
        tuple(_tests(description.get("compare"), entries, columns, results)),
        tuple(paper["statements"].get(description.get("statements"), ())),
        results.judge if any(is_judged(column["figure"]) for column in columns) else None,
    )


def markdown(table: Table) -> str:
    """A table in Markdown, with its tests and the paper's statements."""
    first = 1 + table.has_groups
    rows = []
    for row in table.rows:
        names = [row.group, f"*{row.name} (paper)*" if row.paper else row.name][-first:]
        rows.append([*names, *(_emphasized(figure, row.paper, "**{}**", "*{}*") for figure in row.figures)])
    text = [
        f"# {table.title}",
        markdown_table([*[""] * first, *table.columns], rows, first),
        "Values with 95% bootstrap intervals; bold is the best of a group, rows in italics are the paper's.",
    ]
    if table.judge:
        text.append(f"Judged by `{table.judge}`; the paper's judge was GPT-4o.")
    if table.notes:
        text += ["The paper says:", "\n".join(f"- {note}" for note in table.notes)]
    if table.tests:
        text += ["## Paired tests", markdown_table(TEST_HEADER, [_test_row(test) for test in table.tests], 4)]
        text.append("p is corrected by Holm's method over the tests of a column: those of one figure.")
    return "\n\n".join(text) + "\n"


def latex(table: Table) -> str:
    """A table for a LaTeX document that loads booktabs."""
    first = 1 + table.has_groups
    text = [
        r"\begin{tabular}{" + "l" * first + "r" * len(table.columns) + "}",
        r"\toprule",
        " & ".join([""] * first + [_latex(column) for column in table.columns]) + r" \\",
    ]
    group = None
    for row in table.rows:
        if row.group != group:
            text.append(r"\midrule")
        name = rf"\textit{{{_latex(row.name)} (paper)}}" if row.paper else _latex(row.name)
        names = [_latex(row.group) if row.group != group else "", name][-first:]
        styles = r"\textbf{{{}}}", r"\textit{{{}}}", _latex
        figures = [_emphasized(figure, row.paper, *styles) for figure in row.figures]
        text.append(" & ".join([*names, *figures]) + r" \\")
        group = row.group
    return "\n".join([*text, r"\bottomrule", r"\end{tabular}"]) + "\n"


def is_judged(figure: str) -> bool:
    """Whether a figure comes from granulon-judge."""
    return figure.startswith(JUDGED)


def _test_row(test: dict) -> list[str]:
    start = [test["ours"], test["theirs"], test["group"], f"{test['task']} {test['figure']}"]
    if "not_tested" in test:
        return [*start, test["not_tested"], "", "", "", ""]
    difference = f"{test['difference']:+.2f} [{test['low']:+.2f}, {test['high']:+.2f}]"
    return [*start, difference, test["test"], str(test["samples"]), f"{test['p']:.4f}", f"{test['p_corrected']:.4f}"]


def _tests(compare: str | None, entries: list[Entry], columns: list[dict], results: Results) -> list[dict]:
    """The planned tests of a table, with p-values corrected over those of a figure."""
    figures = dict.fromkeys((task, column["figure"]) for column in columns for task in column["tasks"])
    pairs = [
        (ours, theirs)
        for ours in entries
        for theirs in entries
        if ours.name == compare and theirs.name != compare and ours.group == theirs.group
    ]
    tests = []
    for figure in figures:
        found = [results.compare(ours, theirs, *figure, comparisons=len(pairs)) for ours, theirs in pairs]
        found = [test for test in found if test is not None]
        corrected = holm([test.get("p", float("nan")) for test in found])
        tests += [{**test, **({"p_corrected": p} if "p" in test else {})} for test, p in zip(found, corrected)]
    return tests


def _mark_best(figures: list[list[Figure]], columns: list[dict]) -> list[tuple[Figure, ...]]:
    """The figures of a group's entries, the best of each column marked where they differ."""
    for place, column in enumerate(columns):
        values = [own[place].value for own in figures if own[place].value is not None]
        higher = METRICS[metric_of(column["figure"])].higher_is_better
        if len(set(values)) < 2 or higher is None:
            continue
        best = max(values) if higher else min(values)
        for own in figures:
            own[place] = replace(own[place], best=own[place].value == best)
    return [tuple(own) for own in figures]


def _paper_row(group: str, name: str, values: dict, columns: list[dict]) -> TableRow:
    """The paper's figures for an entry; empty in columns that the paper does not have."""
    figures = tuple(Figure(values.get(column.get("paper"))) for column in columns)
    return TableRow(group, name, figures, paper=True)


def _emphasized(figure: Figure, paper: bool, best: str, published: str, escape: Callable[[str], str] = str) -> str:
    """A figure as text, in the format for the best of its group or for the paper's."""
    text = escape(str(figure))
    if not text:
        return text
    return best.format(text) if figure.best else published.format(text) if paper else text


def _entry_key(entry: dict) -> str:
    """An entry as text, without tasks and the command that makes the model."""
    return json.dumps({k: v for k, v in entry.items() if k not in ("tasks", "made_by")}, sort_keys=True)


def _changed_sample(*results: dict) -> str | None:
    """The id of a sample for which two runs have read different rows of the data."""
    ours, theirs = ({str(s["id"]): s.get("doc_sha256") for s in _samples(result["folder"])} for result in results)
    return next((name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]), None)


def _array(statistics: dict[str, list[float]]) -> np.ndarray:
    return np.array(list(statistics.values()), dtype=float)


@lru_cache(maxsize=64)
def _samples(folder: str) -> list[dict]:
    return read_samples(Path(folder))


def _latex(text: str) -> str:
    return text.translate(LATEX)
