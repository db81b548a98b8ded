"""Rows of similar length share a batch, in an order that is random and can be repeated."""

import numpy as np

from granulon.train.sampling import GroupedByLength

LENGTHS = np.random.default_rng(0).integers(5, 500, 1003)


def padded_share(order, batch=16):
    batches = [LENGTHS[order[start : start + batch]] for start in range(0, len(order), batch)]
    slots = sum(len(rows) * rows.max() for rows in batches)
    return 1 - LENGTHS.sum() / slots


def test_every_row_comes_once_and_little_is_padded():
    order = list(GroupedByLength(LENGTHS, 16, seed=0))
    assert sorted(order) == list(range(1003))
    assert padded_share(order) < 0.1 < 0.4 < padded_share(list(range(1003)))


def test_the_order_follows_from_seed_and_epoch():
    first, again, other = (GroupedByLength(LENGTHS, 16, seed) for seed in (0, 0, 1))
    assert list(first) == list(again) != list(other)
    again.set_epoch(1)
    assert list(first) != list(again)
    first.set_epoch(1)
    assert list(first) == list(again)


def test_long_and_short_batches_alternate_at_random():
    order = list(GroupedByLength(LENGTHS, 16, seed=0))
    means = [LENGTHS[order[start : start + 16]].mean() for start in range(0, 992, 16)]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.5


def test_few_rows_make_one_batch():
    assert sorted(GroupedByLength(LENGTHS[:3], 16, seed=0)) == [0, 1, 2]
