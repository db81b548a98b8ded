"""Rows that cannot be used: the file that records them, and the limit above which a run stops."""

import json
import logging
import os
from collections import Counter, defaultdict
from pathlib import Path

from accelerate import PartialState

logger = logging.getLogger(__name__)

MIN_ROWS = 100  # the share of bad rows is relative to at least so many


class Quarantine:
    """The file of unusable rows, their counts by source, and the limit."""

    def __init__(self, path: str | Path, max_bad_share: float, labels: list[str]):
        rank = PartialState().process_index
        self.path = Path(path) if rank == 0 else Path(f"{path}.rank{rank}")
        self.max_bad_share, self.labels = max_bad_share, labels
        self.is_main = rank == 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self.reset_counts()

    def reset_counts(self):
        """Start counting again; the file stays."""
        self.rows, self.bad, self.first = Counter(), Counter(), defaultdict(list)
        self.written, self.process = set(), None

    def put(self, number: int, index: int, turn: int | None, reason: str, row, once: bool = False):
        """Count a bad row and write it; with `once`, a row that a stream repeats is written a single time."""
        self.bad[number] += 1
        if len(self.first[number]) < 3:
            self.first[number].append(f"row {index}: {reason}")
        entry = {"source": self.labels[number], "index": index, "turn": turn, "reason": reason, "row": row}
        if once and not self._is_new(entry):
            return
        if once or self.is_main:
            line = json.dumps(entry, default=str).encode() + b"\n"
            with open(self.path, "ab", buffering=0) as file:
                file.write(line)  # in one call, since other workers append too

    def _is_new(self, entry: dict) -> bool:
        if self.process != os.getpid():  # a data loader's worker starts from the rows in the file
            self.process = os.getpid()
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            self.written = {self._identity(json.loads(line)) for line in lines}
        identity = self._identity(entry)
        is_new = identity not in self.written
        self.written.add(identity)
        return is_new

    @staticmethod
    def _identity(entry: dict) -> str:
        """Everything but the index, which differs between the epochs of a shuffled stream."""
        return json.dumps({name: value for name, value in entry.items() if name != "index"}, default=str)

    def report(self, number: int):
        """Log the numbers of rows; raises `ValueError` for too many bad rows or no usable one."""
        self.stop_if_too_many(number)
        bad, rows = self.bad[number], self.rows[number]
        if bad == rows:
            raise ValueError(f"{self.labels[number]} has no usable row{self._examples(number)}")
        if self.is_main:
            logger.info("%s: %d rows", self.labels[number], rows - bad)
            if bad:
                logger.warning(
                    "%s: %d of %d rows are unusable%s", self.labels[number], bad, rows, self._examples(number)
                )

    def stop_if_too_many(self, number: int):
        bad, rows = self.bad[number], self.rows[number]
        if bad > self.max_bad_share * max(rows, MIN_ROWS):
            raise ValueError(
                f"{bad} of {rows} rows of {self.labels[number]} cannot be used, more than max_bad_share = "
                f"{self.max_bad_share:g}{self._examples(number)}"
            )

    def _examples(self, number: int) -> str:
        first = "".join(f"\n  {reason}" for reason in self.first[number])
        return (
            f"; they are in {self.path}: repair them or raise max_bad_share; the first ones:{first}" if first else ""
        )
