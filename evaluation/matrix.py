"""The matrix of an evaluation: entries (a model and how it is evaluated), tasks, and the folders of finished runs.

A run is one entry on one task. Its key is a hash of everything that decides its answers, so that a finished run is
found again after its entry was renamed or its model was moved. Entries that come to the same run share its folder;
each adds its description there.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from string import Template

import yaml
from huggingface_hub import snapshot_download

from granulon.hub.files import read_jsonl, write_atomically
from granulon.hub.manifest import MANIFEST, versions, weights_sha256
from granulon.hub.text import first_line

from .protocols import OURS

MATRICES = Path(__file__).parent
COLUMNS = MATRICES / "columns.yaml"
RUNS, RESULT, SAMPLES, ANSWERS = "runs", "result.json", "samples.jsonl", "answers.jsonl"
LIBRARIES = ("granulon", "lmms_eval", "transformers", "torch", "datasets", "sacrebleu", "numpy")
_weights_sha256 = lru_cache(weights_sha256)  # every task of an entry needs it


@dataclass(frozen=True)
class Entry:
    """
    An entry of a table: a model, and how it is evaluated.

    Args:
        name: as shown in the table.
        group: the block of the table, such as the language model.
        model, revision: a folder or a Hub repository.
        granularity, view: as in `GranulonForEvaluation`.
        overrides: changes of the configuration.
        tasks: of this entry; None for the matrix's.
        made_by: the command that trains the model, printed where the model is missing.
        trained_on: the tasks on whose training data the model was trained; on others it is evaluated zero-shot.
    """

    name: str
    model: str
    group: str = ""
    revision: str = "main"
    granularity: str | int | None = None
    view: str = "full"
    overrides: dict = field(default_factory=dict)
    tasks: tuple[str, ...] | None = None
    made_by: str | None = None
    trained_on: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """
    Settings that all runs of a matrix share.

    Args:
        limit: number of samples of each task; None for all.
        sample_rows: whether the samples are generated (sample_rows.py) instead of the task's data.
        bertscore_model: encoder for BERTScore, a folder or Hub id; it changes figures, but no answers.
        protocol: a name in protocols.py.
    """

    limit: int | None = None
    sample_rows: bool = False
    bertscore_model: str = "roberta-large"
    protocol: str = OURS


@dataclass(frozen=True)
class Run:
    """One entry on one task."""

    entry: Entry
    task: str

    @property
    def name(self) -> str:
        return " / ".join(part for part in (self.entry.group, self.entry.name, self.task) if part)


@dataclass(frozen=True)
class Matrix:
    """Entries, tasks, and descriptions of tables (see `tables.make_table`)."""

    entries: list[Entry]
    tasks: list[str]
    tables: list[dict]

    @property
    def runs(self) -> list[Run]:
        """All runs, entry by entry, so that each model is loaded once."""
        return [Run(entry, task) for entry in self.entries for task in entry.tasks or self.tasks]


def read_matrix(name: str) -> Matrix:
    """
    Read a matrix from a YAML file, or the one of that name in the package (`matrix`, `ablations`).

    An entry or column with `each`, lists by name, stands for one for each place in the lists, with `$name` filled in.
    A column that is a text is that of columns.yaml with this title.

    Raises:
        ValueError: the file does not exist or is not YAML, has unknown keys or columns, or two entries have the same
            name.
    """
    path = Path(name) if Path(name).is_file() else MATRICES / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"there is no matrix {name}; give a YAML file, or one of matrix, ablations")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict) or not {"entries", "tasks"} <= content.keys() <= {"entries", "tasks", "tables"}:
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} holds {found}; expected entries, tasks and optionally tables")
    entries = []
    for number, written in enumerate(content["entries"]):
        place = f"entry {number} of {path}"
        entries += [_entry(place, given) for given in _filled(place, written)]
    names = [(entry.group, entry.name) for entry in entries]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path} has more than one entry named {sorted(repeated)}; give each its own name")
    known, tables = yaml.safe_load(COLUMNS.read_text()), content.get("tables") or []
    tables = [_with_columns(f"the table {table.get('name')} of {path}", table, known) for table in tables]
    return Matrix(entries, list(content["tasks"]), tables)


def model_identity(model: str, revision: str) -> dict:
    """
    What identifies a model: the commit of a Hub repository or the hash of a folder's weights, and its manifest.

    Raises:
        ValueError: the model was not found.
    """
    folder = Path(model)
    if folder.is_dir():
        identity = {"sha256": _weights_sha256(folder)}
    else:
        try:
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=["*.json"]))
        except Exception as error:  # the client's own errors have no common class
            raise ValueError(f"{model} was not found locally or on the Hub: {first_line(error)}") from error
        identity = {"revision": folder.name}
    manifest = folder / MANIFEST
    return {**identity, "manifest": json.loads(manifest.read_text()) if manifest.is_file() else None}


def run_key(entry: Entry, identity: dict, task: dict, settings: Settings) -> str:
    """The key of a run: a hash of everything that decides its answers."""
    options = {name: getattr(entry, name) for name in ("granularity", "view", "overrides")}
    model = {name: value for name, value in identity.items() if name != "manifest"}
    shared = [settings.limit, settings.sample_rows, settings.protocol]
    content = json.dumps([options, model, task, *shared], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def effective_overrides(entry: Entry) -> dict:
    """The overrides that differ from the checkpoint's own configuration; all of them for a model on the Hub."""
    config = Path(entry.model, "config.json")
    own = json.loads(config.read_text()) if config.is_file() else {}
    return {name: value for name, value in entry.overrides.items() if name not in own or own[name] != value}


def run_folder(output: Path, run: Run, key: str) -> Path:
    """The folder of a run: the one that has its key, else a new name."""
    for folder in (output / RUNS).glob(f"*-{key}"):
        return folder
    slug = re.sub(r"[^\w.]+", "-", f"{run.entry.group} {run.entry.name} {run.task}").strip("-").lower()
    return output / RUNS / f"{slug[:80]}-{key}"


def add_entry(folder: Path, entry: Entry):
    """Record in the folder of a finished run that it is also the run of this entry."""
    text = json.dumps(asdict(entry), indent=1, sort_keys=True)
    if json.loads(text) != json.loads((folder / RESULT).read_text())["entry"]:
        write_atomically(folder / f"entry-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json", text)


def read_results(output: Path) -> list[dict]:
    """The results of all finished runs, the newest last; each with its `folder`, all its `entries`, and the scores of
    each judge in `judges`."""
    results = []
    for file in sorted((output / RUNS).glob(f"*/{RESULT}")):
        result = json.loads(file.read_text())
        result["settings"] = {"protocol": OURS} | result.get("settings", {})  # older runs do not name it
        judges = {more.stem: json.loads(more.read_text()) for more in sorted(file.parent.glob("judge-*.json"))}
        entries = [json.loads(more.read_text()) for more in sorted(file.parent.glob("entry-*.json"))]
        results.append(result | {"folder": str(file.parent), "judges": judges, "entries": [result["entry"], *entries]})
    return sorted(results, key=lambda result: result["finished_at"])


def largest_runs(
    output: Path, only: Sequence[str] = (), tasks: Sequence[str] = (), protocol: str = OURS
) -> list[dict]:
    """
    For each entry and task the result of the finished run with the most samples, and of equal ones the newest.

    Args:
        only, tasks: names of entries and of tasks; all by default.
        protocol: of the runs.

    Raises:
        ValueError: there is no finished run, or none of an entry's name or of the tasks.
    """
    found = {}
    for result in read_results(output):
        if result["settings"]["protocol"] != protocol:
            continue
        key = json.dumps([result["entry"], result["task"]["name"]], sort_keys=True)
        if key not in found or result.get("samples", 0) >= found[key].get("samples", 0):
            found[key] = result
    if not found:
        which, option = ("", "") if protocol == OURS else (f" of the protocol {protocol}", f" --protocol {protocol}")
        raise ValueError(
            f"{output} has no finished runs{which}; run granulon-evaluate --output {output}{option} first"
        )
    names = {result["entry"]["name"] for result in found.values()}
    if missing := set(only) - names:
        raise ValueError(f"{output} has no finished run of {sorted(missing)}; it has {sorted(names)}")
    chosen = [result for result in found.values() if not only or result["entry"]["name"] in only]
    if tasks and not any(result["task"]["name"] in tasks for result in chosen):
        raise ValueError(
            f"{output} has no finished run of the tasks {', '.join(tasks)}; it has "
            f"{', '.join(sorted({result['task']['name'] for result in chosen}))}"
        )
    return [result for result in chosen if not tasks or result["task"]["name"] in tasks]


def read_samples(folder: Path) -> list[dict]:
    """The samples of a finished run, in the order of the data."""
    return read_jsonl(folder / SAMPLES)


def used_versions() -> dict[str, str | None]:
    """The versions of the libraries that figures depend on, and the commit of this package."""
    return versions(*LIBRARIES)


def _filled(place: str, written: dict) -> list[dict]:
    """An entry or column as written or, with lists of equal length under `each`, one for each place in the lists."""
    lists = written.get("each")
    if lists is None:
        return [written]
    rest = {key: value for key, value in written.items() if key != "each"}
    try:
        return [_fill(rest, dict(zip(lists, values))) for values in zip(*lists.values(), strict=True)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{place} cannot be filled in from {lists}: {error}; expected lists of equal length by name, and $name of "
            "these in the texts"
        ) from error


def _fill(value, own: dict):
    """`value` with `$name` in its texts filled in; a text that is nothing else becomes the value, number or text."""
    if isinstance(value, dict):
        return {key: _fill(inner, own) for key, inner in value.items()}
    if isinstance(value, list):
        return [_fill(inner, own) for inner in value]
    if not isinstance(value, str):
        return value
    return own[value[1:]] if value.startswith("$") and value[1:] in own else Template(value).substitute(own)


def _with_columns(place: str, table: dict, known: dict) -> dict:
    """A table whose columns are described; the `known` ones of columns.yaml may be given by their titles."""
    if not table.get("columns"):
        raise ValueError(f"{place} has no columns")
    columns = []
    for column in table["columns"]:
        if isinstance(column, str) and column not in known:
            raise ValueError(f"{place} has an unknown column {column!r}; describe it, or name one of {list(known)}")
        columns += [{"title": column, **known[column]}] if isinstance(column, str) else _filled(place, column)
    return {**table, "columns": columns}


def _entry(place: str, given: dict) -> Entry:
    known = Entry.__dataclass_fields__.keys()
    if unknown := given.keys() - known:
        raise ValueError(f"{place} has unknown keys {sorted(unknown)}; known are {', '.join(known)}")
    if missing := {"name", "model"} - given.keys():
        raise ValueError(f"{place} has no {' and no '.join(sorted(missing))}")
    return Entry(
        **{key: tuple(value) if key in ("tasks", "trained_on") and value else value for key, value in given.items()}
    )
