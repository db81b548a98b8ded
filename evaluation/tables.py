"""Tables of finished runs, in Markdown and LaTeX, with the paper's figures beside ours, intervals and paired tests.

A figure is a value with its 95% bootstrap interval. A table row marked "(paper)" holds the paper's own figures. A run
that was not made is shown as such. A column follows one protocol; if the runs of both were made, there is one for
each. If a table names an entry to compare with, its differences to the others of its group are tested on the same
samples: McNemar's exact test for right-or-wrong figures, else random swaps. These are the planned comparisons of a
column; the p-values of a column are corrected together by Holm's method.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import yaml

from granulon.hub.files import write_atomically
from granulon.hub.text import markdown_table, with_interval

from .matrix import Entry, Matrix, Settings, read_results, read_samples
from .metrics import BERTSCORE, JUDGED, METRICS
from .protocols import AUTHORS, OURS, PROTOCOLS
from .scoring import metric_of, units
from .statistics import FEWEST, holm, mcnemar, paired, percentiles, resampled

PAPER = Path(__file__).with_name("paper_tables.yaml")
UNDEFINED = "undefined"  # such as the precision of a model that never says yes
NOT_RUN, NOT_COMPUTED, NOT_JUDGED, UNKNOWN = "not run", "not computed", "not judged", "no such figure"
NOT_PLANNED = "–"  # not one of the entry's tasks
TABLE_KEYS = {"name", "title", "columns", "tasks", "groups", "compare", "paper", "statements"}
TEST_HEADER = ["", "against", "", "figure", "difference", "test", "samples", "p", "p corrected"]
NOT_COMPARABLE = "†"
EXPLAINED = "† zero-shot, not comparable with the paper's: the model was not trained on this data set (`trained_on`)."
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "λ": r"$\lambda$"}
    | {"†": r"$^{\dagger}$"}
)


@dataclass(frozen=True)
class Figure:
    """A value with its interval, or the reason why there is none."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    missing: str = ""
    best: bool = False
    zero_shot: bool = False  # whether the paper's figure is of a model that was trained on the data set, and ours not

    def __str__(self) -> str:
        text = with_interval(self.value, self.low, self.high)
        return f"{text} {NOT_COMPARABLE}" if text and self.zero_shot else text or self.missing


@dataclass(frozen=True)
class TableRow:
    """Our figures of an entry, or published ones, with their source."""

    group: str
    name: str
    figures: tuple[Figure, ...]
    source: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} ({self.source})" if self.source else self.name


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    tests: tuple[dict, ...]
    statements: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def has_groups(self) -> bool:
        return any(row.group for row in self.rows)


class Results:
    """
    The finished runs of an output folder that have these settings, the newest of each entry, task and protocol.

    Attributes:
        other_settings: number of finished runs with other settings, by the names of the settings that differ.
        protocol: that of the settings.
        judges: by protocol, the judge whose scores are shown, the one that scored most runs, of equal ones the newest:
            scores of two judges are not mixed.
    """

    def __init__(self, output: Path, settings: Settings):
        self.runs, self.other_settings, self.protocol = {}, Counter(), settings.protocol
        wanted = {name: value for name, value in asdict(settings).items() if name != "protocol"}
        for result in read_results(output):
            relevant = [name for name in wanted if name != "bertscore_model" or BERTSCORE in result["metrics"]]
            different = tuple(name for name in relevant if result["settings"].get(name) != wanted[name])
            if different:
                self.other_settings[different] += 1
                continue
            for entry in result["entries"]:
                self.runs[_entry_key(entry), result["task"]["name"], result["settings"]["protocol"]] = result
        self.judges = {protocol: self._judge(protocol) for protocol in PROTOCOLS}

    def _judge(self, protocol: str) -> str | None:
        runs = [result for result in self.runs.values() if result["settings"]["protocol"] == protocol]
        scores = [scores for result in runs for scores in result["judges"].values()]
        count = Counter(one["judge"] for one in scores)
        order = sorted(scores, key=lambda one: (count[one["judge"]], one["finished_at"]))
        return order[-1]["judge"] if order else None

    def protocols(self, tasks: list[str], figure: str) -> list[str]:
        """The protocols that have a figure of these tasks, and runs of one; without runs, the one asked for."""
        known = [name for name, rules in PROTOCOLS.items() if all(rules.has(task, figure) for task in tasks)]
        made = {(task, protocol) for _, task, protocol in self.runs}
        found = [name for name in known if any((task, name) in made for task in tasks)]
        return found or [self.protocol if self.protocol in known else known[0] if known else OURS]

    def result(self, entry: Entry, task: str, protocol: str = OURS) -> dict | None:
        return self.runs.get((_entry_key(asdict(entry)), task, protocol))

    def figure(self, entry: Entry, tasks: list[str], name: str, protocol: str = OURS) -> Figure:
        """A figure of an entry on a task, or its mean over several tasks."""
        results = [self.result(entry, task, protocol) for task in tasks]
        if None in results:
            return Figure(missing=NOT_RUN if set(tasks) <= set(entry.tasks or tasks) else NOT_PLANNED)
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
            scores = self.scores(result)
            if scores is None or scores["waiting"]:
                return NOT_JUDGED if scores is None else f"{scores['waiting']} not judged yet"
            metrics = scores["metrics"]
        if name not in metrics:
            return NOT_COMPUTED if name in result["not_computed"] else UNKNOWN
        return metrics[name] if metrics[name]["value"] is not None else UNDEFINED

    def scores(self, result: dict) -> dict | None:
        """The scores of a run by the judge that is shown."""
        return result["judges"].get(self.judges[result["settings"]["protocol"]])

    def units(self, result: dict, name: str) -> dict[str, list[float]]:
        """The statistics of a figure by unit (see `scoring.units`), from the run's samples or the judge's scores."""
        samples = self.scores(result)["samples"] if is_judged(name) else _samples(result["folder"])
        return units(samples, name)

    def compare(
        self, ours: Entry, theirs: Entry, task: str, name: str, protocol: str, comparisons: int = 1
    ) -> dict | None:
        """A paired test of two entries, or why there is none (`not_tested`); None if one has no such figure.

        comparisons: tests that are corrected together.
        """
        pair = [self.result(entry, task, protocol) for entry in (ours, theirs)]
        if None in pair or any(isinstance(self.lookup(result, name), str) for result in pair):
            return None
        our_units, their_units = (self.units(result, name) for result in pair)
        if not our_units or not their_units:
            return None
        test = {"ours": ours.name, "theirs": theirs.name, "group": ours.group, "task": task, "figure": name}
        test["protocol"] = protocol
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
        keys = [(entry, protocol) for entry in matrix.entries for protocol in PROTOCOLS]
        found = [result for entry, protocol in keys if (result := results.result(entry, task, protocol))]
        judged = [scores for result in found if (scores := results.scores(result))]
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
    columns = list(_columns(description, results))
    published = paper["tables"].get(description.get("paper"), {})
    rows = []
    for group in dict.fromkeys(entry.group for entry in entries):
        own = [entry for entry in entries if entry.group == group]
        figures = [[_figure(results, entry, column) for column in columns] for entry in own]
        theirs = dict(published.get(group, {}))
        for entry, marked in zip(own, _mark_best(figures, columns)):
            rows.append(TableRow(group, entry.name, marked))
            if entry.name in theirs:
                rows.append(_paper_row(group, entry.name, theirs.pop(entry.name), columns))
        rows += [_paper_row(group, name, values, columns) for name, values in theirs.items()]
    for other in paper["other_papers"].get(description.get("paper"), ()):
        rows += [_paper_row(other["group"], *row, columns, other["source"]) for row in other["rows"].items()]
    return Table(
        description["name"],
        description["title"],
        tuple(_column_title(column) for column in columns),
        tuple(rows),
        tuple(_tests(description.get("compare"), entries, columns, results)),
        tuple(paper["statements"].get(description.get("statements"), ())),
        tuple(_notes(columns, rows, results, paper["basis"].get(description.get("paper"), ()))),
    )


def markdown(table: Table) -> str:
    """A table in Markdown, with its tests and the paper's statements."""
    first = 1 + table.has_groups
    rows = []
    for row in table.rows:
        names = [row.group, f"*{row.label}*" if row.source else row.label][-first:]
        rows.append([*names, *(_emphasized(figure, row.source, "**{}**", "*{}*") for figure in row.figures)])
    text = [
        f"# {table.title}",
        markdown_table([*[""] * first, *table.columns], rows, first),
        "Values with 95% bootstrap intervals; bold is the best of a group, rows in italics are published.",
        *table.notes,
    ]
    if table.statements:
        text += ["The paper says:", "\n".join(f"- {statement}" for statement in table.statements)]
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
        name = rf"\textit{{{_latex(row.label)}}}" if row.source else _latex(row.label)
        names = [_latex(row.group) if row.group != group else "", name][-first:]
        styles = r"\textbf{{{}}}", r"\textit{{{}}}", _latex
        figures = [_emphasized(figure, row.source, *styles) for figure in row.figures]
        text.append(" & ".join([*names, *figures]) + r" \\")
        group = row.group
    return "\n".join([*text, r"\bottomrule", r"\end{tabular}"]) + "\n"


def is_judged(figure: str) -> bool:
    """Whether a figure comes from granulon-judge."""
    return figure.startswith(JUDGED)


def _test_row(test: dict) -> list[str]:
    figure = _column_title({"title": f"{test['task']} {test['figure']}", "protocol": test["protocol"]})
    start = [test["ours"], test["theirs"], test["group"], figure]
    if "not_tested" in test:
        return [*start, test["not_tested"], "", "", "", ""]
    difference = f"{test['difference']:+.2f} [{test['low']:+.2f}, {test['high']:+.2f}]"
    return [*start, difference, test["test"], str(test["samples"]), f"{test['p']:.4f}", f"{test['p_corrected']:.4f}"]


def _tests(compare: str | None, entries: list[Entry], columns: list[dict], results: Results) -> list[dict]:
    """The planned tests of a table, with p-values corrected over those of a figure."""
    figures = dict.fromkeys(
        (task, column["figure"], column["protocol"]) for column in columns for task in column["tasks"]
    )
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


def _figure(results: Results, entry: Entry, column: dict) -> Figure:
    """The figure of an entry in a column, marked if the paper's model was trained on the data set and ours was not."""
    figure = results.figure(entry, column["tasks"], column["figure"], column["protocol"])
    return replace(figure, zero_shot=bool(column.get("paper")) and not set(column["tasks"]) <= set(entry.trained_on))


def _columns(description: dict, results: Results) -> Iterator[dict]:
    """The columns of a table, one for each protocol; the paper's figures stand in the authors' if there is one."""
    for column in description["columns"]:
        column = {"tasks": description.get("tasks"), **column}
        protocols = results.protocols(column["tasks"], column["figure"])
        for protocol in protocols:
            published = {} if protocol == AUTHORS or AUTHORS not in protocols else {"paper": None}
            yield {**column, "protocol": protocol, **published}


def _column_title(column: dict) -> str:
    return column["title"] + (" (authors' protocol)" if column["protocol"] == AUTHORS else "")


def _notes(columns: list[dict], rows: list[TableRow], results: Results, basis: Sequence[str]) -> Iterator[str]:
    """What a reader must know to compare the figures of a table: protocols, judges, and what the paper's rest on."""
    for protocol in dict.fromkeys(column["protocol"] for column in columns):
        whose = "our" if protocol == OURS else "the authors'"
        yield f"Columns of {whose} protocol: {PROTOCOLS[protocol].note}."
        judged = any(is_judged(column["figure"]) for column in columns if column["protocol"] == protocol)
        if judged and results.judges[protocol]:
            yield f"Judged by `{results.judges[protocol]}`; the paper's judge was GPT-4o."
    if any(figure.zero_shot and figure.value is not None for row in rows for figure in row.figures):
        yield EXPLAINED
    if any(column.get("paper") and column["protocol"] == OURS for column in columns):
        yield (
            "The paper's figures follow the authors' protocol. In a column of our protocol they are not comparable "
            "with ours; `granulon-evaluate --protocol authors` adds columns where they are."
        )
    if basis:
        yield "What the paper's figures rest on:\n\n" + "\n".join(f"- {line}" for line in basis)


def _paper_row(group: str, name: str, values: dict, columns: list[dict], source: str = "paper") -> TableRow:
    """Published figures of an entry; empty in columns that the source does not have."""
    figures = tuple(Figure(values.get(column.get("paper"))) for column in columns)
    return TableRow(group, name, figures, source)


def _emphasized(figure: Figure, source: str, best: str, published: str, escape: Callable[[str], str] = str) -> str:
    """A figure as text, in the format for the best of its group or for published ones."""
    text = escape(str(figure))
    if not text:
        return text
    return best.format(text) if figure.best else published.format(text) if source else text


def _entry_key(entry: dict) -> str:
    """An entry as text, without what does not change its answers."""
    ignored = ("tasks", "made_by", "trained_on")
    return json.dumps({name: value for name, value in entry.items() if name not in ignored}, sort_keys=True)


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
