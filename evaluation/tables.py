"""Tables of finished runs, in Markdown and LaTeX, with the paper's figures beside ours, intervals and paired tests.

A figure is a value with its 95% bootstrap interval. A line marked "(paper)" is the paper's own. A run that was not
run says so. Where a table names an entry to compare with, its differences to the others of its group are tested on
the same samples: McNemar's exact test for right-or-wrong figures, else the paired bootstrap; the p-values of a table
are corrected together by Holm's method.
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

from .matrix import SCORING, Entry, Matrix, Settings, read_results, read_samples
from .metrics import JUDGED, METRICS
from .plots import draw_table
from .scoring import metric_of, units
from .statistics import holm, mcnemar, paired, percentiles, resampled

PAPER = Path(__file__).with_name("paper_tables.yaml")
BERTSCORE = "bertscore"
UNDEFINED = "undefined"  # such as the precision of a model that never says yes
NOT_RUN, NOT_COMPUTED, NOT_JUDGED, NO_SUCH = "not run", "not computed", "not judged", "no such figure"
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "λ": r"$\lambda$"}
)


@dataclass(frozen=True)
class Figure:
    """One entry of a table: a value with its interval, or why there is none."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    samples: int = 0
    missing: str = ""
    best: bool = False

    def __str__(self) -> str:
        if self.value is None:
            return self.missing
        within = "" if self.low is None else f" [{self.low:.1f}, {self.high:.1f}]"
        return f"{self.value:.2f}{within}"


@dataclass(frozen=True)
class Line:
    group: str
    name: str
    figures: tuple[Figure, ...]
    paper: bool = False


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    tests: tuple[dict, ...]
    notes: tuple[str, ...]
    judge: str | None = None


class Results:
    """
    What is there of a matrix: the newest finished run of each entry and task, under these settings. `others` counts
    those under other settings, by what is different.

    Args:
        judge: whose scores count; by default that of most runs, the newest of several: scores of two do not mix.
    """

    def __init__(self, output: Path, settings: Settings, judge: str | None = None):
        self.runs, self.others, wanted = {}, Counter(), _plain(asdict(settings))
        for result in read_results(output):
            own = [name for name in wanted if name not in SCORING or BERTSCORE in result["metrics"]]
            different = tuple(name for name in own if result["settings"].get(name) != wanted[name])
            if different:
                self.others[different] += 1
                continue
            for entry in result["entries"]:
                self.runs[_entry_key(entry), result["task"]["name"]] = result
        judged = [told for result in self.runs.values() for told in result["judges"].values()]
        number = Counter(told["judge"] for told in judged)
        if judge is not None and judge not in number:
            raise ValueError(f"there are no scores by {judge}, there are by: {', '.join(sorted(number)) or 'nobody'}")
        order = sorted(judged, key=lambda told: (number[told["judge"]], told["finished_at"]))
        self.judge = judge or (order[-1]["judge"] if order else None)

    def of(self, entry: Entry, task: str) -> dict | None:
        return self.runs.get((_entry_key(asdict(entry)), task))

    def figure(self, entry: Entry, runs: list[list[str]]) -> Figure:
        """The figure of a column, which may be the mean over several tasks."""
        found = [self.of(entry, task) for task, _ in runs]
        if None in found:
            return Figure(missing=NOT_RUN)
        entries = [self.entry(result, name) for result, (_, name) in zip(found, runs)]
        if missing := next((entry for entry in entries if isinstance(entry, str)), None):
            return Figure(missing=missing)
        samples = sum(entry["n"] for entry in entries)
        value = float(np.mean([entry["value"] for entry in entries]))
        if len(entries) == 1:
            return Figure(value, entries[0]["low"], entries[0]["high"], samples)
        draws = [self._draws(result, name, place) for place, (result, (_, name)) in enumerate(zip(found, runs))]
        if any(draw is None for draw in draws):
            return Figure(value, samples=samples)
        return Figure(value, *percentiles(np.mean(draws, axis=0)), samples)

    def entry(self, result: dict, name: str) -> dict | str:
        """Value and interval of a figure of a run, or why there is none."""
        metrics = result["metrics"]
        if is_judged(name):
            told = result["judges"].get(self.judge)
            if told is None or told["waiting"]:
                return NOT_JUDGED if told is None else f"{told['waiting']} not judged yet"
            metrics = told["metrics"]
        if name not in metrics:
            return NOT_COMPUTED if name in result["not_computed"] else NO_SUCH
        return metrics[name] if metrics[name]["value"] is not None else UNDEFINED

    def compare(self, ours: Entry, theirs: Entry, task: str, figure: str) -> dict | None:
        """A paired test of two entries, or why there is none; None where one of them has no such figure."""
        pair = [self.of(entry, task) for entry in (ours, theirs)]
        if None in pair or any(isinstance(self.entry(result, figure), str) for result in pair):
            return None
        found = [self.units(result, figure) for result in pair]
        if not all(found):
            return None
        told = {"ours": ours.name, "theirs": theirs.name, "group": ours.group, "task": task, "figure": figure}
        if found[0].keys() != found[1].keys():
            reason = (
                f"{ours.name} has {len(found[0])} samples and {theirs.name} {len(found[1])}, "
                f"{len(found[0].keys() & found[1].keys())} of them the same; run both on the same"
            )
            return {**told, "not_tested": reason}
        if other := self._other_rows(*pair):
            return {**told, "not_tested": f"sample {other} is not the same in both: the data have changed in between"}
        metric = METRICS[metric_of(figure)]
        ours_NS, theirs_NS = (np.array([own[unit] for unit in found[0]], dtype=float) for own in found)
        test = paired(metric.value, ours_NS, theirs_NS, seed=pair[0]["settings"]["seed"])
        if metric.proportion:
            test["p"] = mcnemar(ours_NS[:, 0], theirs_NS[:, 0])
        return {**told, **test, "test": "McNemar" if metric.proportion else "bootstrap", "samples": len(ours_NS)}

    def units(self, result: dict, figure: str) -> dict[str, list[float]]:
        """Statistics by unit, of the run's samples or of what the judge has said of them."""
        if is_judged(figure):
            return units(result["judges"][self.judge]["samples"], figure)
        return units(_samples(result["folder"]), figure)

    @staticmethod
    def _other_rows(one: dict, other: dict) -> str | None:
        """A sample of which two runs have read different rows of the data."""
        hashes = [{str(s["id"]): s.get("doc_sha256") for s in _samples(result["folder"])} for result in (one, other)]
        return next((name for name in hashes[0].keys() & hashes[1].keys() if hashes[0][name] != hashes[1][name]), None)

    def _draws(self, result: dict, figure: str, place: int) -> np.ndarray | None:
        own = self.units(result, figure)
        metric = METRICS[metric_of(figure)]
        return resampled(metric.value, np.array(list(own.values()), dtype=float), seed=place) if own else None


def write_tables(output: Path, matrix: Matrix, results: Results) -> list[Path]:
    """Markdown, LaTeX, plots and the tests of every table of a matrix; the files written."""
    folder = output / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    paper = yaml.safe_load(PAPER.read_text())
    written = []
    for wanted in matrix.tables or [everything(matrix, results)]:
        table = make_table(wanted, matrix, results, paper)
        for suffix, text in ((".md", markdown(table)), (".tex", latex(table)), (".json", as_json(table))):
            write_atomically(folder / f"{table.name}{suffix}", text)
            written.append(folder / f"{table.name}{suffix}")
        written += draw_table(table, folder / table.name)
    return written


def everything(matrix: Matrix, results: Results) -> dict:
    """A table of all figures that there are, for a matrix that names none."""
    columns = []
    for task in matrix.tasks:
        found = [result for entry in matrix.entries if (result := results.of(entry, task))]
        judged = [result["judges"][results.judge] for result in found if results.judge in result["judges"]]
        names = dict.fromkeys(name for one in [*found, *judged] for name in one["metrics"]) or {"": None}
        columns += [{"title": f"{task} {name}".strip(), "figures": [[task, name]]} for name in names]
    return {"name": "results", "title": "Results", "columns": columns}


def make_table(wanted: dict, matrix: Matrix, results: Results, paper: dict) -> Table:
    """
    A table as a matrix describes it: `name`, `title`, `columns` (title, runs, paper), and if it likes `groups` (only
    these), `compare` (the entry whose differences are tested), `paper` (the paper's table) and `statements`.

    Raises:
        ValueError: unknown entries.
    """
    known = {"name", "title", "columns", "groups", "compare", "paper", "statements"}
    if unknown := wanted.keys() - known:
        raise ValueError(f"the table {wanted.get('name')} has {sorted(unknown)}; a table has {sorted(known)}")
    entries = [entry for entry in matrix.entries if entry.group in wanted.get("groups", [entry.group])]
    columns = wanted["columns"]
    published = paper["tables"].get(wanted.get("paper"), {})
    lines = []
    for group in dict.fromkeys(entry.group for entry in entries):
        own = [entry for entry in entries if entry.group == group]
        figures = [[results.figure(entry, column["figures"]) for column in columns] for entry in own]
        theirs = dict(published.get(group, {}))
        for entry, line in zip(own, _with_best(figures, columns)):
            lines.append(Line(group, entry.name, line))
            if entry.name in theirs:
                lines.append(_paper_line(group, entry.name, theirs.pop(entry.name), columns))
        lines += [_paper_line(group, name, values, columns) for name, values in theirs.items()]
    return Table(
        wanted["name"],
        wanted["title"],
        tuple(column["title"] for column in columns),
        tuple(lines),
        tuple(_tests(wanted.get("compare"), entries, columns, results)),
        tuple(paper["statements"].get(wanted.get("statements"), ())),
        results.judge if any(is_judged(name) for column in columns for _, name in column["figures"]) else None,
    )


def markdown(table: Table) -> str:
    """The table, its tests and what the paper says about it."""
    head = ["", "", *table.columns] if _has_groups(table) else ["", *table.columns]
    text = [f"# {table.title}", "", _markdown_row(head), _markdown_row(["---"] * len(head))]
    for line in table.lines:
        figures = [_marked(figure, line.paper, "**{}**", "*{}*") for figure in line.figures]
        name = f"*{line.name}*" if line.paper else line.name
        text.append(_markdown_row([*([line.group] if _has_groups(table) else []), name, *figures]))
    text += ["", "Values with 95% bootstrap intervals; bold is the best of a group, lines in italics are the paper's."]
    if table.judge:
        text += ["", f"Judged by `{table.judge}`; the paper's judge was GPT-4o."]
    if table.notes:
        text += ["", "The paper says:", "", *(f"- {note}" for note in table.notes)]
    if table.tests:
        text += ["", "## Paired tests", "", _markdown_row(TEST_HEAD), _markdown_row(["---"] * len(TEST_HEAD))]
        text += [_markdown_row(_test_row(test)) for test in table.tests]
        text += ["", "p is corrected by Holm's method over all tests of this table."]
    return "\n".join(text) + "\n"


def latex(table: Table) -> str:
    """The table for a paper that loads booktabs."""
    groups = _has_groups(table)
    text = [
        r"\begin{tabular}{" + "l" * (1 + groups) + "r" * len(table.columns) + "}",
        r"\toprule",
        " & ".join([""] * (1 + groups) + [_latex(column) for column in table.columns]) + r" \\",
    ]
    before = None
    for line in table.lines:
        if line.group != before:
            text.append(r"\midrule")
        figures = [_marked(figure, line.paper, r"\textbf{{{}}}", r"\textit{{{}}}", _latex) for figure in line.figures]
        name = rf"\textit{{{_latex(line.name)}}}" if line.paper else _latex(line.name)
        own = [_latex(line.group) if line.group != before else ""] if groups else []
        text.append(" & ".join([*own, name, *figures]) + r" \\")
        before = line.group
    return "\n".join([*text, r"\bottomrule", r"\end{tabular}"]) + "\n"


def as_json(table: Table) -> str:
    return json.dumps(asdict(table), indent=1, ensure_ascii=False) + "\n"


TEST_HEAD = ["", "against", "", "figure", "difference", "test", "samples", "p", "p corrected"]


def _test_row(test: dict) -> list[str]:
    start = [test["ours"], test["theirs"], test["group"], f"{test['task']} {test['figure']}"]
    if "not_tested" in test:
        return [*start, test["not_tested"], "", "", "", ""]
    difference = f"{test['difference']:+.2f} [{test['low']:+.1f}, {test['high']:+.1f}]"
    return [*start, difference, test["test"], str(test["samples"]), f"{test['p']:.4f}", f"{test['p_corrected']:.4f}"]


def _tests(compare: str | None, entries: list[Entry], columns: list[dict], results: Results) -> list[dict]:
    """Every test that the columns allow, with p-values corrected over all of them."""
    runs = dict.fromkeys(tuple(run) for column in columns for run in column["figures"])
    pairs = [
        (ours, theirs)
        for ours in entries
        for theirs in entries
        if ours.name == compare and theirs.name != compare and ours.group == theirs.group
    ]
    tests = [results.compare(ours, theirs, *run) for ours, theirs in pairs for run in runs]
    tests = [test for test in tests if test is not None]
    corrected = holm([test.get("p", float("nan")) for test in tests])
    return [{**test, **({"p_corrected": p} if "p" in test else {})} for test, p in zip(tests, corrected)]


def _with_best(figures: list[list[Figure]], columns: list[dict]) -> list[tuple[Figure, ...]]:
    """The figures of a group's entries, the best of each column marked where they differ."""
    for place, column in enumerate(columns):
        values = [entry[place].value for entry in figures if entry[place].value is not None]
        if len(set(values)) < 2:
            continue
        higher = METRICS[metric_of(column["figures"][0][1])].higher_is_better
        if higher is None:
            continue
        best = max(values) if higher else min(values)
        for entry in figures:
            entry[place] = replace(entry[place], best=entry[place].value == best)
    return [tuple(entry) for entry in figures]


def _paper_line(group: str, name: str, values: dict, columns: list[dict]) -> Line:
    """The paper's figures for a entry; a column that it does not give is empty."""
    figures = tuple(Figure(values.get(column.get("paper"))) for column in columns)
    return Line(group, f"{name} (paper)", figures, paper=True)


def _marked(figure: Figure, paper: bool, best: str, published: str, escaped: Callable[[str], str] = str) -> str:
    """A figure's text in the form for the best of its group, for the paper's, or plain."""
    text = escaped(str(figure))
    if not text:
        return text
    return best.format(text) if figure.best else published.format(text) if paper else text


def _has_groups(table: Table) -> bool:
    return any(line.group for line in table.lines)


def is_judged(figure: str) -> bool:
    return figure.startswith(JUDGED)


def _entry_key(entry: dict) -> str:
    """A entry as a run knows it: tasks, and what only messages tell, do not matter."""
    told = {key: value for key, value in entry.items() if key not in ("tasks", "made_by")}
    return json.dumps(told, sort_keys=True)


def _plain(value):
    return json.loads(json.dumps(value))


@lru_cache(maxsize=64)
def _samples(folder: str) -> list[dict]:
    return read_samples(Path(folder))


def _markdown_row(entries: list[str]) -> str:
    return "| " + " | ".join(entry.replace("|", "\\|").replace("\n", " ") for entry in entries) + " |"


def _latex(text: str) -> str:
    return text.translate(LATEX)
