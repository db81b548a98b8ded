"""Cells of a matrix: one row (a model and how it is asked) and one task, known by what they hold.

A cell's key is the hash of everything that decides its answers, so that a finished one is found again whatever the
matrix around it looks like and wherever the model lies, and never taken for another. Rows that are called otherwise
and are the same cell share it: each leaves its name there.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from granulon.hub.eval_results import weights_sha256
from granulon.hub.manifest import versions

MATRICES = Path(__file__).parent
RESULT, SAMPLES, ANSWERS = "result.json", "samples.jsonl", "answers.jsonl"
LIBRARIES = ("granulon", "lmms_eval", "transformers", "torch", "datasets", "sacrebleu", "torchmetrics", "numpy")
MANIFEST = "granulon_manifest.json"
_weights_sha256 = lru_cache(weights_sha256)  # a matrix asks for each model once a task
SCORING = ("bertscore_model", "bertscore_layer")  # settings that decide no answer


@dataclass(frozen=True)
class Row:
    """
    A line of a table: a model, and how it is asked.

    Args:
        name: as it stands in the table.
        group: the block of the table, such as the language model.
        model, revision: a folder or a Hub repository.
        granularity, view: as of the adapter.
        overrides: changes of the configuration.
        tasks: of this row, where they are not the matrix's.
        made_by: the command that makes the model, for the message where it is missing.
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


@dataclass(frozen=True)
class Settings:
    """What all cells of a run share and what decides their figures; BERTScore's part in it is `SCORING`."""

    limit: int | None = None
    seed: int = 0
    dtype: str = "auto"
    sample_rows: bool = False
    bertscore_model: str = "roberta-large"
    bertscore_layer: int | None = 17
    max_new_tokens: int = 256


@dataclass(frozen=True)
class Cell:
    row: Row
    task: str

    @property
    def name(self) -> str:
        return " / ".join(part for part in (self.row.group, self.row.name, self.task) if part)


@dataclass(frozen=True)
class Matrix:
    rows: list[Row]
    tasks: list[str]
    tables: list[dict]

    @property
    def cells(self) -> list[Cell]:
        """Row by row, so that a model is loaded once."""
        return [Cell(row, task) for row in self.rows for task in row.tasks or self.tasks]


def read_matrix(name: str) -> Matrix:
    """
    A matrix from a YAML file, or from the one of that name in the package (`matrix`, `ablations`).

    Raises:
        ValueError: no such file, not YAML, unknown keys, or rows of one name.
    """
    path = Path(name) if Path(name).is_file() else MATRICES / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"there is no matrix {name}; give a YAML file, or one of matrix, ablations")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict) or not {"rows", "tasks"} <= content.keys() <= {"rows", "tasks", "tables"}:
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} holds {found}; a matrix has rows, tasks and, if it likes, tables")
    rows = [_row(path, number, entry) for number, entry in enumerate(content["rows"])]
    names = [(row.group, row.name) for row in rows]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path} has more than one row named {sorted(twice)}; names tell the rows apart")
    return Matrix(rows, list(content["tasks"]), list(content.get("tables") or []))


def model_identity(model: str, revision: str) -> dict:
    """
    What a model is: the commit of a Hub repository, or the hash of a folder's weights, and its manifest.

    Raises:
        ValueError: neither is to be had.
    """
    folder = Path(model)
    if folder.is_dir():
        identity = {"sha256": _weights_sha256(folder)}
    else:
        try:
            validate_repo_id(model)
        except HFValidationError as error:
            raise ValueError(f"the model's folder {model} is not there") from error
        try:
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=["*.json"]))
        except Exception as error:  # the client's own errors have no common class
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{model} is no folder, and not to be had from the Hub: {reason}") from error
        identity = {"revision": folder.name}
    manifest = folder / MANIFEST
    return {**identity, "manifest": json.loads(manifest.read_text()) if manifest.is_file() else None}


def cell_key(row: Row, identity: dict, task: dict, settings: Settings) -> str:
    """The key of a cell: its row without names, what the model is, what the task is, and the settings."""
    told = {name: value for name, value in asdict(row).items() if name in ("granularity", "view", "overrides")}
    model = {name: value for name, value in identity.items() if name != "manifest"}
    asked = {name: value for name, value in asdict(settings).items() if name not in SCORING}
    content = json.dumps([told, model, task, asked], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def own_overrides(row: Row) -> dict:
    """A row's changes of the configuration without those that the checkpoint has itself; a folder's alone is read."""
    config = Path(row.model, "config.json")
    own = json.loads(config.read_text()) if config.is_file() else {}
    return {name: value for name, value in row.overrides.items() if name not in own or own[name] != value}


def cell_folder(output: Path, cell: Cell, key: str) -> Path:
    """Where a cell is, under whatever name it was begun, or else where it is to be."""
    for folder in (output / "cells").glob(f"*-{key}"):
        return folder
    slug = re.sub(r"[^\w.]+", "-", f"{cell.row.group} {cell.row.name} {cell.task}").strip("-").lower()
    return output / "cells" / f"{slug[:80]}-{key}"


def tell_row(folder: Path, row: Row):
    """Leave a row's name with a cell that another row has done."""
    told = asdict(row)
    if told != asdict(Row(**json.loads((folder / RESULT).read_text())["row"])):
        name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
        write_whole(folder / f"row-{name}.json", json.dumps(told, indent=1))


def read_results(output: Path) -> list[dict]:
    """Every finished cell under an output folder, the newest last, with all `rows` that it is the cell of, and what
    each judge has added under `judges`."""
    results = []
    for file in sorted((output / "cells").glob(f"*/{RESULT}")):
        judges = {more.stem: json.loads(more.read_text()) for more in sorted(file.parent.glob("judge-*.json"))}
        rows = [json.loads(more.read_text()) for more in sorted(file.parent.glob("row-*.json"))]
        result = json.loads(file.read_text())
        results.append(result | {"folder": str(file.parent), "judges": judges, "rows": [result["row"], *rows]})
    return sorted(results, key=lambda result: result["finished_at"])


def fullest_cells(results: list[dict]) -> list[dict]:
    """Of each row and task the cell of most samples, the newest of several: not a short try in place of the whole."""
    found = {}
    for result in results:
        key = json.dumps([result["row"], result["task"]["name"]], sort_keys=True)
        if key not in found or result.get("samples", 0) >= found[key].get("samples", 0):
            found[key] = result
    return list(found.values())


def read_samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]


def write_whole(path: Path, text: str):
    """The file appears complete or not at all."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def used_versions() -> dict[str, str | None]:
    """Of the libraries that have a part in a figure, and the commit of this package."""
    return versions(*LIBRARIES)


def _row(path: Path, number: int, entry: dict) -> Row:
    entry = dict(entry)
    known = Row.__dataclass_fields__.keys()
    if unknown := entry.keys() - known:
        raise ValueError(f"row {number} of {path} has {sorted(unknown)}; a row has {', '.join(known)}")
    if missing := {"name", "model"} - entry.keys():
        raise ValueError(f"row {number} of {path} has no {' and no '.join(sorted(missing))}")
    if entry.get("tasks") is not None:
        entry["tasks"] = tuple(entry["tasks"])
    return Row(**entry)
