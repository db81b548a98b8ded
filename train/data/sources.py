"""Open data sources: files, folders, the Hub, WebDataset shards, memory or drawn scenes; images stay undecoded."""

import glob
import importlib
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path

from datasets import Dataset, Image, IterableDataset, List, load_dataset, load_from_disk

from .formats import ALIASES, FIELDS, FORMATS, BadRow, Reader, mapped, parse_row
from .quarantine import MIN_ROWS
from .scenes import make_questions, make_scene

BUILDERS = {
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "text",  # one row per line, parsed here, so that a broken line is one bad row
    ".parquet": "parquet",
    ".tar": "webdataset",
}
SCENES = "scenes"  # a source's path: the drawn world of scenes.py
FIRST_SCENE = {"train": 0, "test": 500_000}  # seed of the first scene of a split


@dataclass
class DataSource:
    """
    A source of rows and how to read it.

    Args:
        path (`str`): a file (.json, .jsonl, .parquet, .csv, .arrow, .tar; wildcards allowed), a folder, a dataset
            saved by `datasets`, or a dataset of the Hub; "scenes" is the drawn world of scenes.py; in Python also a
            `Dataset` or `IterableDataset`.
        name (`str`, *optional*): the configuration of a dataset of the Hub.
        split (`str`): as in `load_dataset`, `"train[:1%]"` too.
        format (`str`, *optional*): one of `FORMATS`; found from the columns by default.
        columns (`dict`, *optional*): maps our names (`FIELDS`) to those of the columns.
        question (`str`, *optional*): the question of every row of a source that has only answers (captions).
        image_folder (`str`, *optional*): folder of relative image paths; by default the folder of `path`.
        map (`str`, *optional*): "module:function", which makes a row in one of the formats (a dict) of a stored one.
        weight (`float`, *optional*): how often rows are drawn from here, relative to the other sources' weights.
    """

    path: str
    name: str | None = None
    split: str = "train"
    format: str | None = None
    columns: dict[str, str] | None = None
    question: str | None = None
    image_folder: str | None = None
    map: str | None = None
    weight: float | None = None

    def __post_init__(self):
        if self.format not in (None, *FORMATS):
            raise ValueError(f"{self}: format is {self.format!r}; choose one of {tuple(FORMATS)} or leave it out")
        unknown = set(self.columns or ()) - set(FIELDS)
        if unknown:
            raise ValueError(f"{self}: columns names {sorted(unknown)}; it maps {FIELDS} to the columns of the source")
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"{self}: weight is {self.weight}; give a number above 0 or leave the source out")

    @property
    def function(self):
        """What `map` names; raises `ValueError` if there is no such function."""
        if self.map is None:
            return None
        module, _, name = self.map.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{self}: map is {self.map!r}, expected module:function ({error})") from error
        if not callable(function):
            raise ValueError(f"{self}: map is {self.map!r}, a {type(function).__name__}; expected module:function")
        return function

    def __str__(self):
        path = self.path if isinstance(self.path, str) else type(self.path).__name__
        return ":".join(part for part in (path, self.name, self.split) if part)

    @classmethod
    def of(cls, entry: "DataSource | Dataset | IterableDataset | dict | str") -> "DataSource":
        """A source from an entry of a recipe: a path, or a mapping of the arguments."""
        if isinstance(entry, cls):
            return entry
        if not isinstance(entry, dict):
            return cls(entry)
        names = [known.name for known in fields(cls)]
        if "path" not in entry or set(entry) - set(names):
            raise ValueError(f"a data source has the keys {sorted(entry)}; expected 'path' and any of {names[1:]}")
        return cls(**entry)


def open_source(source: DataSource, streaming: bool = False):
    """The stored rows, undecoded, and their `Reader`; raises `ValueError`."""
    raw, is_lines = load_source(source, streaming)
    if streaming:
        raw = raw.to_iterable_dataset() if isinstance(raw, Dataset) else raw
        raw = raw.decode(False) if raw.features else raw
    elif isinstance(raw, IterableDataset):
        raise ValueError(f"{source} is a stream; pass streaming=True")
    else:
        raw = raw.with_format("arrow")  # undecoded: only load_rgb opens images
    function = source.function
    names, image_names = _column_names(raw, source, is_lines, function)
    columns = _find_columns(source, names, image_names)
    return raw, Reader(
        label=str(source),
        format=source.format or next(known for known, needed in FORMATS.items() if set(needed) <= set(columns)),
        columns={name: column for name, column in columns.items() if column is not None},
        image_folder=os.path.abspath(os.path.expanduser(source.image_folder or _folder_of(source.path))),
        question=source.question,
        is_lines=is_lines,
        features=raw.features,
        map=function,
    )


def load_source(source: DataSource, streaming: bool = False) -> tuple[Dataset | IterableDataset, bool]:
    """The dataset of a source, and whether its rows are lines of JSON; raises `ValueError`."""
    if source.path == SCENES:
        return drawn_rows(source), False
    if isinstance(source.path, (Dataset, IterableDataset)):
        return source.path, False
    path = os.path.expanduser(source.path)
    builder = BUILDERS.get(Path(path).suffix) if not os.path.isdir(path) else None
    if builder and "://" not in path and not glob.glob(path):
        raise ValueError(f"{source} cannot be loaded: there is no file {path}")
    try:
        if os.path.exists(os.path.join(path, "dataset_dict.json")):
            raw = load_from_disk(path)[source.split]
        elif os.path.exists(os.path.join(path, "state.json")):
            raw = load_from_disk(path)
        elif builder:
            options = {"encoding_errors": "replace"} if builder == "text" else {}
            files = {source.split.partition("[")[0]: path}
            streaming = streaming and builder != "json"  # a JSON list is read as a whole anyway
            raw = load_dataset(builder, data_files=files, split=source.split, streaming=streaming, **options)
        else:
            raw = load_dataset(path, source.name, split=source.split, streaming=streaming)
    except Exception as error:  # every builder has its own exceptions
        reason = error.__cause__ or error
        raise ValueError(
            f"{source} cannot be loaded: {reason} ({type(reason).__name__}); expected a file in one of the formats "
            f"{tuple(BUILDERS)} that is not empty, a folder, or a dataset of the Hub"
        ) from error
    return raw, builder == "text"


def drawn_rows(source: DataSource) -> Dataset:
    """Drawn scenes: a row for each question, with its level; the split "train[:200]" means 200 scenes."""
    match = re.fullmatch(r"(train|test)\[:(\d+)\]", source.split)
    if not match or int(match[2]) > FIRST_SCENE["test"]:
        raise ValueError(
            f"{source} has the split {source.split!r}; drawn scenes take 'train[:N]' or 'test[:N]', N up to "
            f"{FIRST_SCENE['test']}"
        )
    rows = []
    for number in range(int(match[2])):
        scene = make_scene(FIRST_SCENE[match[1]] + number)
        rows += [
            {"images": [scene.draw()], "question": q.text, "answer": q.answer, "granularity": q.level}
            for q in make_questions(scene)
        ]
    return Dataset.from_list(rows)


def first_row(raw, label: str) -> dict:
    first = next(iter(raw), None)
    if first is None:
        raise ValueError(f"{label} is empty; remove it or add rows")
    return _as_row(first)


def _as_row(stored) -> dict:
    return stored if isinstance(stored, dict) else stored.to_pylist()[0]


def _column_names(raw, source: DataSource, is_lines: bool, function) -> tuple[list[str], list[str]]:
    """The columns of a source, and those that `datasets` declares as images."""
    first = first_row(raw, str(source))
    features = raw.features or {}
    image_names = [name for name, feature in features.items() if _contains_images(feature)]
    if not is_lines:
        inner = mapped(parse_row(first, False, raw.features), function)
        return list(inner), image_names if function is None else []
    names = {}
    for stored, _ in zip(raw, range(MIN_ROWS)):
        try:
            names.update(mapped(parse_row(_as_row(stored), True, None), function) or {})
        except BadRow:
            continue
    return list(names), []


def _contains_images(feature) -> bool:
    """Whether a column holds images: declared as such, or files with bytes and path as `datasets` stores images."""
    is_file = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    return isinstance(feature, Image) or is_file or (isinstance(feature, List) and _contains_images(feature.feature))


def _find_columns(source: DataSource, names: list[str], image_names: list[str]) -> dict[str, str | None]:
    """Maps our names to columns; a question that is the same for every row has the column None."""
    absent = sorted(set((source.columns or {}).values()) - set(names))
    found = {
        name: next((other for other in (name, *ALIASES.get(name, ())) if other in names), None) for name in FIELDS
    }
    columns = {name: column for name, column in found.items() if column is not None} | (source.columns or {})
    if source.question is not None:
        columns.setdefault("question", None)
    if "images" not in (source.columns or {}):
        likely = [name for name in image_names if name in ("image", "images")] or image_names
        if len(likely) > 1:
            raise ValueError(f"{source} has images in the columns {likely}; name one: columns={{'images': ...}}")
        found = likely or [name for name in ("images", "image") if name in names]
        columns |= {"images": found[0]} if found else {}
    fits = [known for known, needed in FORMATS.items() if set(needed) <= set(columns)]
    if absent or not fits or (source.format and source.format not in fits):
        wanted = {source.format: FORMATS[source.format]} if source.format else FORMATS
        raise ValueError(
            f"{source} has the columns {names}{f', not {absent}' if absent else ''}; expected "
            f"{' or '.join(f'{list(needed)} ({known})' for known, needed in wanted.items())}; rename with "
            "columns={'question': ..., 'answer': ...}"
        )
    return columns


def _folder_of(path) -> str:
    if not isinstance(path, str):
        return ""
    return path if os.path.isdir(os.path.expanduser(path)) else os.path.dirname(path)
