"""Streams as training reads them: without an end, their shards spread over processes and data-loader workers."""

import logging

from datasets import IterableDataset

EVEN = 1.05  # how much more often the rows of one shard may pass than those of another, without a word

logger = logging.getLogger(__name__)


def endless(rows: IterableDataset, processes: int, workers: int) -> IterableDataset:
    """
    A stream that starts again where it would end, in the same order, and so has no epochs.

    At the end of an epoch the processes of a training would be at different steps, since their shards hold different
    numbers of rows: gradients of different steps would be averaged. A resumed training could not skip more than an
    epoch. `accelerate` gives every process its own shards, or, of fewer shards than processes, its own rows of all
    shards; `datasets` divides those among the process's workers. Parquet files are divided further where this is
    uneven; what stays uneven is logged.

    Args:
        processes (`int`): of the training.
        workers (`int`): data-loader workers of a process; 0 for none.
    """
    if unevenness(rows.num_shards, processes, workers) > EVEN:
        rows = rows.reshard()
    if (ratio := unevenness(rows.num_shards, processes, workers)) > EVEN:
        logger.warning(
            "the data has %d shards for %d processes with %d workers each: the rows of some pass %.2g times as often "
            "as others; choose a number of processes and dataloader_num_workers that divides it, or make more shards",
            rows.num_shards, processes, workers, ratio,
        )  # fmt: skip
    return rows.repeat(None)


def unevenness(shards: int, processes: int, workers: int) -> float:
    """How many times as often the rows of one shard pass as those of another, if all shards are equally large."""
    of_processes = _divided(shards, processes) if shards >= processes else [shards]  # all shards are read by each
    turns = []  # shards that share a worker, times the workers that take turns: proportional to a row's rarity
    for own in of_processes:
        active = min(own, max(workers, 1))
        turns += [count * active for count in _divided(own, active)]
    return max(turns) / min(turns)


def _divided(count: int, parts: int) -> list[int]:
    return [count // parts + (part < count % parts) for part in range(parts)]
