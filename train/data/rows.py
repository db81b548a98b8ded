"""Load training rows from all supported formats; invalid rows go to a quarantine file.

LLaVA JSON, messages with images, prompts with completions, or columns of questions and answers, from files, folders,
the Hub, WebDataset shards or memory, become rows for TRL's collator:

    {"prompt": [messages], "completion": [one answer], "images": [RGB pictures], "granularity": a level's name or None}

Every answer of a conversation becomes a separate row with the preceding messages as its prompt: the controller reads
the latest question, so each answer needs the image at the level of its own question.

Too many invalid rows stop the run. Rows in memory are checked before training, which decodes every image once
(`num_proc` processes, cached by `datasets`); this builds a table of row numbers, and images are decoded again when a
batch needs them. Streamed rows are checked during training.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
)
from datasets.fingerprint import Hasher
from trl import apply_chat_template

from .formats import BadRow, Reader, Turn, open_image, without_bytes
from .quarantine import Quarantine
from .sources import DataSource, first_row, open_source

SHUFFLE_BUFFER = 1000  # streamed rows, with their images undecoded
CHECKED = Features(
    {
        "source": Value("int32"),
        "row": Value("int64"),
        "turn": Value("int32"),
        "length": Value("int32"),  # tokens of the row, those of its images included
        "reason": Value("string"),
    }
)
STREAMED = Features(
    {
        "source": Value("int32"),
        "row": Value("int64"),
        "turn": Value("int32"),
        "reason": Value("string"),
        "content": Value("string"),  # the rest of the row in JSON, or for a bad row its content for the quarantine
        "images": List({"bytes": Value("binary"), "path": Value("string")}),
    }
)


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
    level_tokens: dict[str, int] | None = None,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Training rows of one or more sources.

    Without weights the sources are concatenated (the trainer shuffles). With weights rows are drawn from a random
    source by weight until all sources are exhausted, so that small ones repeat. Streams are shuffled here, within a
    buffer; several need weights because their sizes are unknown. The same arguments give the same rows in the same
    order, in every process and after a restart. Several processes with streams of rows that differ in their number of
    images need `dispatch_batches=False` in the trainer's `accelerator_config`.

    Args:
        sources: `DataSource`s, mappings of their arguments, paths, or datasets.
        processor: the one to train with; renders the rows and counts their tokens.
        seed (`int`): of the mix of sources and the shuffling of streams.
        quarantine: JSON Lines file for invalid rows: source, index (of the row in its source), turn, reason, and the
            row without the bytes of images. Overwritten; other processes than the main one write the rows of streams
            to files beside it.
        streaming (`bool`): read during training instead of checking before it.
        max_bad_share (`float`): maximum share of invalid rows of a source, relative to at least `MIN_ROWS`.
        max_length (`int`, *optional*): rows with more tokens, image tokens included, are invalid; no row is truncated.
        levels (`list[str]`, *optional*): names of the model's levels; rows with others are invalid. `[]` checks none.
        level_tokens (`dict[str, int]`, *optional*): of prompts that show semantic tokens alone, how many each level
            has. By default an image counts with all its slots.
        num_proc (`int`, *optional*): number of processes that check rows in memory.

    Returns:
        `Dataset` (rows are built on access; the column "length" holds their tokens) or `IterableDataset`.

    Raises:
        ValueError: a source that cannot be loaded, is empty or has an unknown format; too many invalid rows (for
            streams during training); no usable row; weights for some sources only.
    """
    sources = [DataSource.of(entry) for entry in sources]
    _check_weights(sources, streaming)
    quarantined = Quarantine(quarantine, max_bad_share, list(map(str, sources)))
    check = Check(processor, levels, max_length, level_tokens)
    with PartialState().main_process_first():  # fills the caches for the others
        opened = [open_source(source, streaming) for source in sources]
        if streaming:
            return _streamed(sources, opened, check, quarantined, seed)
        checks = [RowCheck(number, reader, check) for number, (_, reader) in enumerate(opened)]
        tables = [_checked_table(n, raw, checks[n], num_proc) for n, (raw, _) in enumerate(opened)]
    for number, (table, (raw, reader)) in enumerate(zip(tables, opened, strict=True)):
        _quarantine_bad(quarantined, number, table, raw, reader)
        quarantined.report(number)
    rows = _mixed([_good(table) for table in tables], sources, seed)
    return rows.with_transform(BuildRows([raw for raw, _ in opened], [reader for _, reader in opened]))


def _check_weights(sources: list[DataSource], streaming: bool):
    weighted = [source.weight is not None for source in sources]
    if not sources or any(weighted) != all(weighted):
        raise ValueError(
            f"{len(sources)} data sources, {sum(weighted)} with a weight; give one or more sources, "
            "with a weight each or without weights"
        )
    if streaming and len(sources) > 1 and not all(weighted):
        raise ValueError("several streams need a weight each, because their sizes are unknown")


@dataclass
class Check:
    """Checks whether a turn can be used: level, chat template, length."""

    processor: object
    levels: list[str] | None = None
    max_length: int | None = None
    level_tokens: dict[str, int] | None = None
    span_lengths: dict = field(default_factory=dict, repr=False)

    def __call__(self, turn: Turn, pictures: list) -> int:
        """The turn's tokens; raises `BadRow`. `pictures` are the turn's images, opened."""
        if turn.granularity is not None and self.levels and turn.granularity not in self.levels:
            raise BadRow(f"its level is {turn.granularity!r}, the model has {self.levels}")
        try:
            texts = apply_chat_template({"prompt": turn.prompt, "completion": turn.completion}, self.processor)
            (texts["prompt"] + texts["completion"]).encode()  # fails for half of a surrogate pair
        except Exception as error:  # a chat template may raise anything
            raise BadRow(f"it cannot be rendered: {str(error) or type(error).__name__}") from error
        return self._length([texts["prompt"], texts["completion"]], pictures, turn.granularity)

    def key(self) -> str:
        """Everything that the result depends on, as text."""
        tokenizer = self.processor.tokenizer
        parts = [type(self.processor).__name__, str(self.processor.chat_template), repr(self.levels)]
        backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else repr(tokenizer)
        if isinstance(backend, dict):  # left over from the latest call
            backend = {name: value for name, value in backend.items() if name not in ("padding", "truncation")}
        spans = [self.processor.patch_size, self.processor.num_semantic_tokens, self.level_tokens]
        parts += [repr(self.max_length), repr(spans), self.processor.image_processor.to_json_string()]
        parts += [json.dumps(backend, sort_keys=True)]
        return "\n".join(parts)

    def _length(self, texts: list[str], pictures: list, level: str | None) -> int:
        """Counts as the collator does: prompt and completion separately, each image with its span of placeholders."""
        ids = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        words = sum(map(len, ids)) - len(pictures)
        if self.level_tokens is None:
            spans = sum(self._span_length(picture.size) for picture in pictures)
        else:
            spans = len(pictures) * self.level_tokens.get(level, max(self.level_tokens.values()))
        if self.max_length is not None and words + spans > self.max_length:
            raise BadRow(
                f"it has {words + spans} tokens, {spans} of them for images, and max_length is {self.max_length}; "
                "rows are never truncated: raise max_length or shorten the row"
            )
        return words + spans

    def _span_length(self, size: tuple[int, int]) -> int:
        if size not in self.span_lengths:
            count = self.processor._get_num_multimodal_tokens(image_sizes=[size[::-1]])
            self.span_lengths[size] = count.num_image_tokens[0]
        return self.span_lengths[size]


@dataclass
class RowCheck:
    """For `Dataset.map`: converts stored rows to one entry of `CHECKED` per turn or invalid row."""

    number: int
    reader: Reader
    check: Check
    rows: list[int] | None = None  # row numbers, if only some are checked

    def __call__(self, table, indices: list[int]) -> dict[str, list]:
        entries = []
        for stored, index in zip(table.to_pylist(), indices, strict=True):
            row = index if self.rows is None else self.rows[index]
            entries += [(self.number, row, *verdict) for verdict in self._verdicts(stored)]
        return {name: [entry[place] for entry in entries] for place, name in enumerate(CHECKED)}

    def key(self) -> str:
        reader = {known.name: str(getattr(self.reader, known.name)) for known in fields(self.reader)}
        return json.dumps([self.number, reader, self.check.key()])

    def _verdicts(self, stored: dict) -> list[tuple[int | None, int | None, str | None]]:
        """(turn, its length, None) or (turn, None, why it is invalid); (None, None, reason) for the whole row."""
        try:
            turns = self.reader.turns(stored)
            pictures = [open_image(image) for image in (turns[-1].images if turns else [])]
        except ValueError as error:
            return [(None, None, str(error))]
        verdicts = []
        for number, turn in enumerate(turns):
            try:
                verdicts.append((number, self.check(turn, pictures[: len(turn.images)]), None))
            except BadRow as error:
                verdicts.append((number, None, str(error)))
        return verdicts


@dataclass
class BuildRows:
    """The transform of the table of row numbers: parses the rows and opens their images."""

    raws: list[Dataset]
    readers: list[Reader]

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if "turn" not in batch:  # a column that was asked for by name
            return batch
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
                f"row {row} of {self.readers[source].label} was valid when it was checked: {error}; restore the "
                "image, or restart to quarantine the row"
            ) from error


def _checked_table(number: int, raw: Dataset, check: RowCheck, num_proc: int | None) -> Dataset:
    """The `CHECKED` entries of a source, cached by `datasets`; invalid rows are checked again at every start, since
    the cache cannot see that an image was repaired."""
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


def _quarantine_bad(quarantined: Quarantine, number: int, table: Dataset, raw: Dataset, reader: Reader):
    bad = table.select(np.flatnonzero(_is_bad(table)))
    quarantined.rows[number] += len(table)
    for entry in bad:
        stored = raw[entry["row"] : entry["row"] + 1].to_pylist()[0]
        quarantined.put(number, entry["row"], entry["turn"], entry["reason"], reader.for_quarantine(stored))


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
    """For `IterableDataset.map`: converts stored rows to one entry of `STREAMED` per turn or invalid row."""

    number: int
    reader: Reader

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        entries = []
        for place, index in enumerate(indices):
            stored = {name: values[place] for name, values in batch.items()}
            try:
                turns = self.reader.turns(stored)
            except BadRow as error:
                content = json.dumps(self.reader.for_quarantine(stored), default=str)
                entries.append((self.number, index, None, str(error), content, []))
                continue
            for number, turn in enumerate(turns):
                content = {"prompt": turn.prompt, "completion": turn.completion, "granularity": turn.granularity}
                entries.append((self.number, index, number, None, json.dumps(content), turn.images))
        return {name: [entry[place] for entry in entries] for place, name in enumerate(STREAMED)}


@dataclass
class StreamCheck:
    """For `IterableDataset.map`, one row at a time: returns a training row, or none and quarantines it."""

    check: Check
    quarantined: Quarantine

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        entry = {name: values[0] for name, values in batch.items()}
        content = json.loads(entry["content"])
        self.quarantined.rows[entry["source"]] += 1
        try:
            if entry["reason"] is not None:
                raise BadRow(entry["reason"])
            pictures = [open_image(image) for image in entry["images"]]
            self.check(Turn(**content, images=entry["images"]), pictures)
        except ValueError as error:
            shown = content if entry["reason"] else {**content, "images": without_bytes(entry["images"])}
            self.quarantined.put(entry["source"], entry["row"], entry["turn"], str(error), shown, once=True)
            self.quarantined.stop_if_too_many(entry["source"])
            return {"prompt": [], "completion": [], "images": [], "granularity": []}
        row = {"prompt": content["prompt"], "completion": content["completion"], "images": pictures}
        return {name: [value] for name, value in {**row, "granularity": content["granularity"]}.items()}


def _streamed(sources, opened, check: Check, quarantined: Quarantine, seed: int) -> IterableDataset:
    parts = [
        raw.map(
            StreamRead(number, reader),
            with_indices=True,
            batched=True,
            batch_size=1,
            remove_columns=list(first_row(raw, reader.label)),
            features=STREAMED,
        )
        for number, (raw, reader) in enumerate(opened)
    ]
    mixed = _mixed(parts, sources, seed)
    check = StreamCheck(check, quarantined)
    if next(iter(_map_stream(mixed, check)), None) is None:
        unusable = (n for n in range(len(sources)) if not quarantined.rows[n] > quarantined.bad[n])
        quarantined.report(next(unusable))
    quarantined.reset_counts()
    return _map_stream(mixed.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), check)


def _map_stream(mixed: IterableDataset, check: StreamCheck) -> IterableDataset:
    return mixed.map(check, batched=True, batch_size=1, remove_columns=list(STREAMED))
