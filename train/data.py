"""Training rows from whatever holds them, and nothing lost silently on the way.

LLaVA JSON, messages with images, prompts with completions, or columns of questions and answers, from files, folders,
the Hub, WebDataset shards or memory, become rows for TRL's collator:

    {"prompt": [messages], "completion": [one answer], "images": [RGB pictures], "granularity": a level's name or None}

Every answer of a conversation is the completion of a row of its own, with what came before as its prompt: the
controller reads the latest question, so that each answer needs an image read for its own question.

A row that cannot be used is written to the quarantine file and counted; too many of them stop the run. Rows in memory
are all checked before training, which decodes every image once (`num_proc` processes, cached by `datasets`); only a
table of row numbers is built, and images are decoded again when a batch needs them. Streamed rows are checked as they
pass.
"""

import glob
import json
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import (
    Dataset,
    Features,
    Image,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.fingerprint import Hasher
from trl import apply_chat_template

from .conversations import FIELDS, FORMATS, BadRow, Reader, Turn, open_image, parsed, without_bytes
from .quarantine import FEWEST_ROWS, Quarantine
from .scenes import make_questions, make_scene

BUILDERS = {
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "text",  # one line a row, parsed here: a broken line is one bad row and not a broken file
    ".parquet": "parquet",
    ".tar": "webdataset",
}
SCENES = "scenes"  # a source's path: the drawn world of scenes.py
FIRST_SCENE = {"train": 0, "test": 500_000}  # by split; no scene is in both
SHUFFLE_BUFFER = 1000  # streamed rows, with their images undecoded
CHECKED = Features(
    {"source": Value("int32"), "row": Value("int64"), "turn": Value("int32"), "reason": Value("string")}
)
STREAMED = Features(
    {
        "source": Value("int32"),
        "row": Value("int64"),
        "turn": Value("int32"),
        "reason": Value("string"),
        "content": Value("string"),  # the rest of the row, or for a bad one what the quarantine shows, as JSON
        "images": List({"bytes": Value("binary"), "path": Value("string")}),
    }
)


@dataclass
class DataSource:
    """
    Where rows come from and how they are read.

    Args:
        path (`str`): a file (.json, .jsonl, .parquet, .csv, .arrow, .tar; wildcards allowed), a folder, a dataset
            saved by `datasets`, or a dataset of the Hub; "scenes" is the drawn world of scenes.py; in Python also a
            `Dataset` or `IterableDataset`.
        name (`str`, *optional*): the configuration of a dataset of the Hub.
        split (`str`): as in `load_dataset`, `"train[:1%]"` too.
        format (`str`, *optional*): one of `FORMATS`; found from the columns by default.
        columns (`dict`, *optional*): our name, one of `FIELDS`, to the name of the column that holds it.
        question (`str`, *optional*): asked in every row of a question-answer source without questions (captions).
        image_folder (`str`, *optional*): what image file names are relative to; the folder of `path` by default.
        weight (`float`, *optional*): how often rows are drawn from here, relative to the other sources' weights.
    """

    path: str
    name: str | None = None
    split: str = "train"
    format: str | None = None
    columns: dict[str, str] | None = None
    question: str | None = None
    image_folder: str | None = None
    weight: float | None = None

    def __post_init__(self):
        if self.format not in (None, *FORMATS):
            raise ValueError(f"{self}: format is {self.format!r}; choose one of {tuple(FORMATS)} or leave it out")
        unknown = set(self.columns or ()) - set(FIELDS)
        if unknown:
            raise ValueError(f"{self}: columns names {sorted(unknown)}; it maps {FIELDS} to the columns of the source")
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"{self}: weight is {self.weight}; give a number above 0 or leave the source out")

    def __str__(self):
        path = self.path if isinstance(self.path, str) else type(self.path).__name__
        return ":".join(part for part in (path, self.name, self.split) if part)

    @classmethod
    def of(cls, entry: "DataSource | Dataset | IterableDataset | dict | str") -> "DataSource":
        """A source from an entry of a recipe: its path, or a mapping of the arguments."""
        if isinstance(entry, cls):
            return entry
        if not isinstance(entry, dict):
            return cls(entry)
        names = [known.name for known in fields(cls)]
        if "path" not in entry or set(entry) - set(names):
            raise ValueError(f"a data source has the keys {sorted(entry)}; expected 'path' and any of {names[1:]}")
        return cls(**entry)


def load_rows(
    sources: list,
    processor,
    *,
    seed: int,
    quarantine: str | Path,
    streaming: bool = False,
    max_bad_share: float = 0.01,
    max_length: int | None = None,
    levels: list[str] | None = None,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Training rows of one or more sources.

    Without weights the sources stand one after the other, each row once (the trainer shuffles). With weights rows are
    drawn from a random source by weight until each was seen whole, so that small ones repeat. Streams are shuffled
    here, within a buffer; several need weights, since their sizes are not known. The same arguments give the same
    rows in the same order, in every process and after a restart. Several processes with streams of rows that differ
    in their number of images need `dispatch_batches=False` in the trainer's `accelerator_config`.

    Args:
        sources: `DataSource`s, mappings of their arguments, paths, or datasets.
        processor: renders the rows and measures them; the one to train with.
        seed (`int`): of the draws between sources and of the shuffling of streams.
        quarantine: file for the rows that cannot be used, one JSON object a line: source, index (of the row in its
            source as read), turn, reason, and the row without the bytes of images. Started anew here; processes
            other than the main one write streamed rows to files beside it.
        streaming (`bool`): read as training goes, without the check before it.
        max_bad_share (`float`): the largest share of a source's rows that may be bad, of `FEWEST_ROWS` at least.
        max_length (`int`, *optional*): rows of more tokens, image tokens included, are bad; nothing is cut.
        levels (`list[str]`, *optional*): names of the model's levels; rows that name others are bad. `[]` checks none.
        num_proc (`int`, *optional*): processes that check rows in memory.

    Returns:
        `Dataset` (rows are made at access) or `IterableDataset`.

    Raises:
        ValueError: a source that cannot be loaded, is empty or of no known format; too many bad rows (for streams when
            the row is met); no usable row; weights for some sources only.
    """
    sources = [DataSource.of(entry) for entry in sources]
    weighted = [source.weight is not None for source in sources]
    if not sources or any(weighted) != all(weighted):
        raise ValueError(f"{len(sources)} data sources, {sum(weighted)} with a weight; give one or more, all or none")
    if streaming and len(sources) > 1 and not all(weighted):
        raise ValueError("several streams are mixed by weight, since their sizes are not known; give each a weight")
    keeper = Quarantine(quarantine, max_bad_share, list(map(str, sources)))
    check = Check(processor, levels, max_length)
    with PartialState().main_process_first():  # the others find the caches filled
        opened = [open_source(source, streaming) for source in sources]
        if streaming:
            return _streamed(sources, opened, check, keeper, seed)
        checks = [RowCheck(number, reader, check) for number, (_, reader) in enumerate(opened)]
        tables = [_checked_table(n, raw, checks[n], num_proc) for n, (raw, _) in enumerate(opened)]
    for number, (table, (raw, reader)) in enumerate(zip(tables, opened, strict=True)):
        _quarantine_bad(keeper, number, table, raw, reader)
        keeper.report(number)
    rows = _mixed([_good(table) for table in tables], sources, seed)
    return rows.with_transform(RowsAtAccess([raw for raw, _ in opened], [reader for _, reader in opened]))


@dataclass
class Check:
    """Whether a turn can be trained on: level, images, chat template, length."""

    processor: object
    levels: list[str] | None = None
    max_length: int | None = None
    span_lengths: dict = field(default_factory=dict, repr=False)

    def __call__(self, turn: Turn, pictures: list):
        """Raises `BadRow`; `pictures` are the turn's images, opened."""
        if turn.granularity is not None and self.levels and turn.granularity not in self.levels:
            raise BadRow(f"its level is {turn.granularity!r}, the model has {self.levels}")
        try:
            texts = apply_chat_template({"prompt": turn.prompt, "completion": turn.completion}, self.processor)
            (texts["prompt"] + texts["completion"]).encode()  # half of a pair of surrogates is no text
        except Exception as error:  # a chat template may raise anything, and often does so on purpose
            raise BadRow(f"it cannot be rendered: {str(error) or type(error).__name__}") from error
        if self.max_length is not None:
            self._check_length([texts["prompt"], texts["completion"]], pictures)

    def key(self) -> str:
        """What a result depends on, as text."""
        tokenizer = self.processor.tokenizer
        parts = [type(self.processor).__name__, str(self.processor.chat_template), repr(self.levels)]
        if self.max_length is not None:
            backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else repr(tokenizer)
            if isinstance(backend, dict):  # padding and truncation are left over from the latest call
                backend = {name: value for name, value in backend.items() if name not in ("padding", "truncation")}
            spans = [self.processor.patch_size, self.processor.num_semantic_tokens]
            parts += [repr(self.max_length), repr(spans), self.processor.image_processor.to_json_string()]
            parts += [json.dumps(backend, sort_keys=True)]
        return "\n".join(parts)

    def _check_length(self, texts: list[str], pictures: list):
        """Counts as the collator does: the prompt and the completion apart, each image's span in place of its mark."""
        ids = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        words = sum(map(len, ids)) - len(pictures)
        spans = sum(self._span_length(picture.size) for picture in pictures)
        if words + spans > self.max_length:
            raise BadRow(
                f"it has {words + spans} tokens, {spans} of them for images, and max_length is {self.max_length}; "
                "rows are never cut: raise max_length or shorten the row"
            )

    def _span_length(self, size: tuple[int, int]) -> int:
        if size not in self.span_lengths:
            count = self.processor._get_num_multimodal_tokens(image_sizes=[size[::-1]])
            self.span_lengths[size] = count.num_image_tokens[0]
        return self.span_lengths[size]


@dataclass
class RowCheck:
    """For `Dataset.map`: stored rows of a source to one entry of `CHECKED` for each turn, or for each bad row."""

    number: int
    reader: Reader
    check: Check
    rows: list[int] | None = None  # the row numbers, where only some are looked at

    def __call__(self, table, indices: list[int]) -> dict[str, list]:
        entries = []
        for stored, index in zip(table.to_pylist(), indices, strict=True):
            row = index if self.rows is None else self.rows[index]
            entries += [(self.number, row, turn, reason) for turn, reason in self._verdicts(stored)]
        return {name: [entry[place] for entry in entries] for place, name in enumerate(CHECKED)}

    def key(self) -> str:
        reader = {known.name: str(getattr(self.reader, known.name)) for known in fields(self.reader)}
        return json.dumps([self.number, reader, self.check.key()])

    def _verdicts(self, stored: dict) -> list[tuple[int | None, str | None]]:
        """(turn, None or what is wrong with it), or (None, what is wrong with the row)."""
        try:
            turns = self.reader.turns(stored)
            pictures = [open_image(image) for image in (turns[-1].images if turns else [])]
        except ValueError as error:
            return [(None, str(error))]
        verdicts = []
        for number, turn in enumerate(turns):
            try:
                self.check(turn, pictures[: len(turn.images)])
            except BadRow as error:
                verdicts.append((number, str(error)))
            else:
                verdicts.append((number, None))
        return verdicts


@dataclass
class RowsAtAccess:
    """The transform of the table of row numbers: reads the rows and opens their images."""

    raws: list[Dataset]
    readers: list[Reader]

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        turns = []
        for source, row, number in zip(batch["source"], batch["row"], batch["turn"], strict=True):
            stored = self.raws[source][row : row + 1].to_pylist()[0]
            turns.append((source, row, self.readers[source].turns(stored)[number]))
        return {
            "prompt": [turn.prompt for _, _, turn in turns],
            "completion": [turn.completion for _, _, turn in turns],
            "images": [self._pictures(*entry) for entry in turns],
            "granularity": [turn.granularity for _, _, turn in turns],
        }

    def _pictures(self, source: int, row: int, turn: Turn) -> list:
        try:
            return [open_image(image) for image in turn.images]
        except ValueError as error:
            raise ValueError(
                f"row {row} of {self.readers[source].label} was whole when it was checked: {error}; put the image "
                "back, or start anew to have the row quarantined"
            ) from error


def _checked_table(number: int, raw: Dataset, check: RowCheck, num_proc: int | None) -> Dataset:
    """The `CHECKED` entries of a source. Kept by `datasets` in its cache, but bad rows are looked at at every start:
    a repaired image is a change that the cache cannot see."""
    key = Hasher.hash([raw._fingerprint, check.key()])
    table = _map_rows(raw, check, num_proc, new_fingerprint=key)
    rows = np.unique(_column(table, "row")[_is_bad(table)])
    if not len(rows):
        return table
    again = RowCheck(number, check.reader, check.check, rows.tolist())
    fresh = _map_rows(raw.select(rows), again, None, keep_in_memory=True, load_from_cache_file=False)
    kept = table.select(np.flatnonzero(~np.isin(_column(table, "row"), rows)))
    both = concatenate_datasets([kept, fresh])
    return both.select(np.argsort(_column(both, "row"), kind="stable"))


def _map_rows(raw: Dataset, check: RowCheck, num_proc: int | None, **kwargs) -> Dataset:
    checked = raw.map(
        check,
        with_indices=True,
        batched=True,
        batch_size=64,
        remove_columns=raw.column_names,
        features=CHECKED,
        num_proc=num_proc,
        desc=f"Checking {check.reader.label}",
        **kwargs,
    )
    return checked.with_format(None)


def _column(table: Dataset, name: str) -> np.ndarray:
    return table.with_format("arrow")[:][name].to_numpy() if len(table) else np.zeros(0, dtype=np.int64)


def _is_bad(table: Dataset) -> np.ndarray:
    return table.with_format("arrow")[:]["reason"].is_valid().to_numpy() if len(table) else np.zeros(0, dtype=bool)


def _good(table: Dataset) -> Dataset:
    return table.select(np.flatnonzero(~_is_bad(table))).remove_columns("reason")


def _quarantine_bad(keeper: Quarantine, number: int, table: Dataset, raw: Dataset, reader: Reader):
    bad = table.select(np.flatnonzero(_is_bad(table)))
    keeper.rows[number] += len(table)
    for entry in bad:
        stored = raw[entry["row"] : entry["row"] + 1].to_pylist()[0]
        keeper.put(number, entry["row"], entry["turn"], entry["reason"], reader.shown(stored))


def _mixed(parts: list, sources: list[DataSource], seed: int):
    if len(parts) == 1:
        return parts[0]
    if sources[0].weight is None:
        return concatenate_datasets(parts)
    weights = np.array([source.weight for source in sources], dtype=np.float64)
    return interleave_datasets(
        parts, probabilities=(weights / weights.sum()).tolist(), seed=seed, stopping_strategy="all_exhausted"
    )


@dataclass
class StreamRead:
    """For `IterableDataset.map`: stored rows of a source to one entry of `STREAMED` for each turn or bad row."""

    number: int
    reader: Reader

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        entries = []
        for place, index in enumerate(indices):
            stored = {name: values[place] for name, values in batch.items()}
            try:
                turns = self.reader.turns(stored)
            except BadRow as error:
                content = json.dumps(self.reader.shown(stored), default=str)
                entries.append((self.number, index, None, str(error), content, []))
                continue
            for number, turn in enumerate(turns):
                content = {"prompt": turn.prompt, "completion": turn.completion, "granularity": turn.granularity}
                entries.append((self.number, index, number, None, json.dumps(content), turn.images))
        return {name: [entry[place] for entry in entries] for place, name in enumerate(STREAMED)}


@dataclass
class StreamCheck:
    """For `IterableDataset.map`, one row at a time: a training row, or none and an entry in the quarantine."""

    check: Check
    keeper: Quarantine

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        entry = {name: values[0] for name, values in batch.items()}
        content = json.loads(entry["content"])
        self.keeper.rows[entry["source"]] += 1
        try:
            if entry["reason"] is not None:
                raise BadRow(entry["reason"])
            pictures = [open_image(image) for image in entry["images"]]
            self.check(Turn(**content, images=entry["images"]), pictures)
        except ValueError as error:
            shown = content if entry["reason"] else {**content, "images": without_bytes(entry["images"])}
            self.keeper.put(entry["source"], entry["row"], entry["turn"], str(error), shown, once=True)
            self.keeper.stop_if_too_many(entry["source"])
            return {"prompt": [], "completion": [], "images": [], "granularity": []}
        row = {"prompt": content["prompt"], "completion": content["completion"], "images": pictures}
        return {name: [value] for name, value in {**row, "granularity": content["granularity"]}.items()}


def _streamed(sources, opened, check: Check, keeper: Quarantine, seed: int) -> IterableDataset:
    parts = [
        raw.map(
            StreamRead(number, reader),
            with_indices=True,
            batched=True,
            batch_size=1,
            remove_columns=list(_first_row(raw, reader.label)),
            features=STREAMED,
        )
        for number, (raw, reader) in enumerate(opened)
    ]
    mixed = _mixed(parts, sources, seed)
    check = StreamCheck(check, keeper)
    if next(iter(_map_stream(mixed, check)), None) is None:
        keeper.report(next(number for number in range(len(sources)) if not keeper.rows[number] > keeper.bad[number]))
    keeper.forget()
    return _map_stream(mixed.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), check)


def _map_stream(mixed: IterableDataset, check: StreamCheck) -> IterableDataset:
    return mixed.map(check, batched=True, batch_size=1, remove_columns=list(STREAMED))


def open_source(source: DataSource, streaming: bool = False):
    """(the stored rows, undecoded, their `Reader`); raises `ValueError`."""
    raw, is_lines = load_source(source, streaming)
    if streaming:
        raw = raw.to_iterable_dataset() if isinstance(raw, Dataset) else raw
        raw = raw.decode(False) if raw.features else raw
    elif isinstance(raw, IterableDataset):
        raise ValueError(f"{source} is a stream; pass streaming=True")
    else:
        raw = raw.with_format("arrow")  # nothing is decoded: images go through load_rgb and nowhere else
    names, image_names = _column_names(raw, source, is_lines)
    columns = _find_columns(source, names, image_names)
    return raw, Reader(
        label=str(source),
        format=source.format or next(known for known, needed in FORMATS.items() if set(needed) <= set(columns)),
        columns={name: column for name, column in columns.items() if column is not None},
        image_folder=os.path.abspath(os.path.expanduser(source.image_folder or _folder_of(source.path))),
        question=source.question,
        is_lines=is_lines,
        features=raw.features,
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
            streaming = streaming and builder != "json"  # a list in JSON is read whole anyway, and typed then
            raw = load_dataset(builder, data_files=files, split=source.split, streaming=streaming, **options)
        else:
            raw = load_dataset(path, source.name, split=source.split, streaming=streaming)
    except Exception as error:  # as many kinds as there are builders
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


def _first_row(raw, label: str) -> dict:
    first = next(iter(raw), None)
    if first is None:
        raise ValueError(f"{label} is empty; take it out, or give it rows")
    return _as_row(first)


def _as_row(stored) -> dict:
    return stored if isinstance(stored, dict) else stored.to_pylist()[0]


def _column_names(raw, source: DataSource, is_lines: bool) -> tuple[list[str], list[str]]:
    """The columns of a source, and those of them that `datasets` knows to hold images."""
    first = _first_row(raw, str(source))
    features = raw.features or {}
    image_names = [name for name, feature in features.items() if _holds_images(feature)]
    if not is_lines:
        inner = parsed(first, False, raw.features)
        return list(inner), image_names
    names = {}
    for stored, _ in zip(raw, range(FEWEST_ROWS)):
        try:
            names.update(parsed(_as_row(stored), True, None) or {})
        except BadRow:
            continue
    return list(names), []


def _holds_images(feature) -> bool:
    return isinstance(feature, Image) or (isinstance(feature, List) and _holds_images(feature.feature))


def _find_columns(source: DataSource, names: list[str], image_names: list[str]) -> dict[str, str | None]:
    """Our names to columns; a question asked in every row has the column None."""
    absent = sorted(set((source.columns or {}).values()) - set(names))
    columns = {name: name for name in FIELDS if name in names} | (source.columns or {})
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
            f"{' or '.join(f'{list(needed)} ({known})' for known, needed in wanted.items())}; say with "
            "columns={'question': ..., 'answer': ...} what yours are called"
        )
    return columns


def _folder_of(path) -> str:
    if not isinstance(path, str):
        return ""
    return path if os.path.isdir(os.path.expanduser(path)) else os.path.dirname(path)
