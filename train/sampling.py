"""Batches of rows of similar length: what is padded is paid for."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL = 32  # batches whose rows are sorted together: long enough to be even, short enough to stay random


class GroupedByLength(Sampler):
    """
    Row numbers in an order in which every `batch` successive ones have similar lengths, in batches in random order.

    The order follows from seed and epoch alone, so that a run can resume within an epoch; the last batch of an epoch,
    which may be smaller, stays last.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int):
        self.lengths, self.batch, self.seed, self.epoch = torch.as_tensor(lengths), batch, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)) % 2**63)
        rows = torch.randperm(len(self), generator=generator)
        pools = [pool[self.lengths[pool].argsort(stable=True)] for pool in rows.split(POOL * self.batch)]
        *batches, last = torch.cat(pools).split(self.batch)
        order = torch.randperm(len(batches), generator=generator).tolist()
        yield from torch.cat([*(batches[number] for number in order), last]).tolist()
