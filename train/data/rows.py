"""Load training rows from all supported formats; invalid rows go to a quarantine file.

LLaVA JSON, messages with images, prompts with completions, or columns of questions and answers, from files, folders,
the Hub, WebDataset shards or memory, become rows for TRL's collator:

    {"prompt": [messages], "completion": [an answer, a question, an answer, ...], "images": [RGB pictures],
     "granularity": a level's name or None; a list of them for several answers}

The answers of a conversation share rows, up to `answers_per_row`: every answer is learned, and what stands before it
is read once.

Too many invalid rows stop the run. Rows in memory are checked before training, which decodes every image once
(`num_proc` processes, cached by `datasets`); this builds a table of row numbers, and images are decoded again when a
batch needs them. Streamed rows are checked during training.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

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

from .conversations import Rendered, render
from .formats import BadRow, Reader, Turn, open_image, without_bytes
from .quarantine import Quarantine
from .sources import DataSource, first_row, open_source

SHUFFLE_BUFFER = 1000  # streamed rows, with their images undecoded
CHECKED = Features(
    {
        "source": Value("int32"),
        "row": Value("int64"),
        "turn": Value("int32"),  # the last answer of the row
        "answers": Value("int32"),  # how many answers it has
        "length": Value("int32"),  # its tokens, those of its images included
        "reason": Value("string"),
    }
)
STREAMED = Features(
    {
        "source": Value("int32"),
        "row": Value("int64"),
        "reason": Value("string"),
        "content": Value("string"),  # all turns of the row in JSON, or for a bad row its content for the quarantine
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
    answers_per_row: int | None = 1,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Training rows of one or more sources.

    Without weights the sources are concatenated (the trainer shuffles). With weights rows are drawn from a random
    source by weight until all sources are exhausted, so that small ones repeat. Streams are shuffled here, within a
    buffer; several need weights because their sizes are unknown. The same arguments give the same rows in the same
    order, in every process and after a restart.

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
        answers_per_row (`int`, *optional*): the most answers of a conversation that share a row; None for all that fit
            into `max_length`. A chat template that writes earlier turns differently once there are later ones gives
            one answer per row.
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
    check = Check(processor, levels, max_length, level_tokens, answers_per_row)
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
    """Checks whether turns can be used (level, chat template, length) and which of them share a row."""

    processor: object
    levels: list[str] | None = None
    max_length: int | None = None
    level_tokens: dict[str, int] | None = None
    answers_per_row: int | None = 1
    span_lengths: dict = field(default_factory=dict, repr=False)

    def __call__(self, turn: Turn, pictures: list) -> int:
        """The tokens of a row of this turn alone; raises `BadRow`. `pictures` are the turn's images, opened."""
        rendered = self._render(turn)
        return self._fitting(self._words(*rendered), self._spans(pictures, turn.granularity))

    def rows(self, turns: list[Turn], pictures: list) -> Iterator[tuple[int, int, int | None, str | None]]:
        """Last turn, number of answers and tokens of every row of a conversation, or the turn, 1, None and why it
        cannot be used. `pictures` are those of the whole conversation, opened."""
        row = None  # number of the last turn, answers, words and how they were rendered
        for number, turn in enumerate(turns):
            spans = self._spans(pictures[: len(turn.images)], turn.granularity)
            try:
                rendered = self._render(turn)
                if row and self._has_room(row) and rendered.continues(row.rendered):
                    words = row.words + self._words(rendered.after(row.rendered), rendered.answer)
                    if self.max_length is None or words + spans <= self.max_length:
                        row = OpenRow(number, row.answers + 1, words, max(spans, row.spans), rendered)
                        continue
                words = self._words(*rendered)
                self._fitting(words, spans)
            except BadRow as error:
                if row:
                    yield row.entry()
                row = None
                yield number, 1, None, str(error)
                continue
            if row:
                yield row.entry()
            row = OpenRow(number, 1, words, spans, rendered)
        if row:
            yield row.entry()

    def _has_room(self, row: "OpenRow") -> bool:
        return self.answers_per_row is None or row.answers < self.answers_per_row

    def _render(self, turn: Turn) -> Rendered:
        if turn.granularity is not None and self.levels and turn.granularity not in self.levels:
            raise BadRow(f"its level is {turn.granularity!r}, the model has {self.levels}")
        try:
            rendered = render(self.processor, turn.prompt, turn.completion)
            "".join(rendered).encode()  # fails for half of a surrogate pair
        except Exception as error:  # a chat template may raise anything
            raise BadRow(f"it cannot be rendered: {str(error) or type(error).__name__}") from error
        return rendered

    def key(self) -> str:
        """Everything that the result depends on, as text."""
        tokenizer = self.processor.tokenizer
        parts = [type(self.processor).__name__, str(self.processor.chat_template), repr(self.levels)]
        backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else repr(tokenizer)
        if isinstance(backend, dict):  # left over from the latest call
            backend = {name: value for name, value in backend.items() if name not in ("padding", "truncation")}
        spans = [self.processor.patch_size, self.processor.num_semantic_tokens, self.level_tokens]
        parts += [repr((self.max_length, self.answers_per_row, spans))]
        parts += [self.processor.image_processor.to_json_string()]
        parts += [json.dumps(backend, sort_keys=True)]
        return "\n".join(parts)

    def _words(self, *texts: str) -> int:
        """Tokens of texts without those of images; as the collator counts, each text by itself."""
        ids = self.processor.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return sum(map(len, ids)) - sum(text.count(self.processor.image_token) for text in texts)

    def _spans(self, pictures: list, level: str | None) -> int:
        """Tokens of images, each with its span of placeholders."""
        if self.level_tokens is not None:
            return len(pictures) * self.level_tokens.get(level, max(self.level_tokens.values()))
        return sum(self._span_length(picture.size) for picture in pictures)

    def _fitting(self, words: int, spans: int) -> int:
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


class OpenRow(NamedTuple):
    """A row that the next turn of its conversation may join."""

    turn: int
    answers: int
    words: int
    spans: int
    rendered: Rendered

    def entry(self) -> tuple[int, int, int, None]:
        return self.turn, self.answers, self.words + self.spans, None


@dataclass
class RowCheck:
    """For `Dataset.map`: converts stored rows to one entry of `CHECKED` per row for training or invalid turn."""

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
        values = {known.name: getattr(self.reader, known.name) for known in fields(self.reader)}
        values |= {"map": Hasher.hash(self.reader.map)}  # another body of the function gives other rows
        reader = {name: str(value) for name, value in values.items()}
        return json.dumps([self.number, reader, self.check.key()])

    def _verdicts(self, stored: dict) -> list[tuple]:
        """What `Check.rows` says; (None, None, None, reason) for a stored row that cannot be read."""
        try:
            turns = self.reader.turns(stored)
            pictures = [open_image(image) for image in (turns[-1].images if turns else [])]
        except ValueError as error:
            return [(None, None, None, str(error))]
        return list(self.check.rows(turns, pictures))


@dataclass
class BuildRows:
    """The transform of the table of row numbers: parses the rows and opens their images."""

    raws: list[Dataset]
    readers: list[Reader]

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if "turn" not in batch:  # a column that was asked for by name
            return batch
        places = zip(batch["source"], batch["row"], batch["turn"], batch["answers"], strict=True)
        return _columns([self._row(*place) for place in places])

    def _row(self, source: int, row: int, last: int, answers: int) -> dict:
        stored = self.raws[source][row : row + 1].to_pylist()[0]
        turns = self.readers[source].turns(stored)[last + 1 - answers : last + 1]
        return training_row(turns) | {"images": self._pictures(source, row, turns[-1])}

    def _pictures(self, source: int, row: int, turn: Turn) -> list:
        try:
            return [open_image(image) for image in turn.images]
        except ValueError as error:
            raise ValueError(
                f"row {row} of {self.readers[source].label} was valid when it was checked: {error}; restore the "
                "image, or restart to quarantine the row"
            ) from error


def training_row(turns: list[Turn]) -> dict:
    """The row of successive turns of a conversation, without its images."""
    first, last = turns[0], turns[-1]
    between = last.prompt[len(first.prompt) :]
    return {
        "prompt": first.prompt,
        "completion": between + last.completion,
        "granularity": [turn.granularity for turn in turns] if len(turns) > 1 else last.granularity,
    }


def turns_of(row: dict) -> list[Turn]:
    """The turns of a training row, with its images: the inverse of `training_row`."""
    prompt, completion, levels = row["prompt"], row["completion"], row["granularity"]
    places = [place for place, message in enumerate(completion) if message["role"] == "assistant"]
    turns = []
    for place, level in zip(places, levels if isinstance(levels, list) else [levels], strict=True):
        before = prompt + completion[:place]
        shown = sum(part["type"] == "image" for message in before for part in message["content"])
        turns.append(Turn(before, completion[place : place + 1], row["images"][:shown], level))
    return turns


def _columns(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in ("prompt", "completion", "images", "granularity")}


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
    """For `IterableDataset.map`: converts a stored row to an entry of `STREAMED`; an empty line gives none."""

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
                entries.append((self.number, index, str(error), content, []))
                continue
            if turns:
                entries.append((self.number, index, None, json.dumps(training_row(turns)), turns[-1].images))
        return {name: [entry[place] for entry in entries] for place, name in enumerate(STREAMED)}


@dataclass
class StreamCheck:
    """For `IterableDataset.map`, one stored row at a time: returns its training rows, quarantines what is invalid."""

    check: Check
    quarantined: Quarantine

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        entry = {name: values[0] for name, values in batch.items()}
        content = json.loads(entry["content"])
        if entry["reason"] is not None:
            self._put(entry, None, entry["reason"], content)
            return _columns([])
        turns = turns_of(content | {"images": entry["images"]})
        try:
            pictures = [open_image(image) for image in entry["images"]]
        except ValueError as error:
            self._put(entry, None, str(error), content | {"images": without_bytes(entry["images"])})
            return _columns([])
        rows = []
        for last, answers, _, reason in self.check.rows(turns, pictures):
            of_row = turns[last + 1 - answers : last + 1]
            row = training_row(of_row)
            if reason is None:
                self.quarantined.rows[entry["source"]] += 1
                rows.append(row | {"images": pictures[: len(of_row[-1].images)]})
            else:
                self._put(entry, last, reason, row | {"images": without_bytes(of_row[-1].images)})
        return _columns(rows)

    def _put(self, entry: dict, turn: int | None, reason: str, shown: dict):
        self.quarantined.rows[entry["source"]] += 1
        self.quarantined.put(entry["source"], entry["row"], turn, reason, shown, once=True)
        self.quarantined.stop_if_too_many(entry["source"])


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
