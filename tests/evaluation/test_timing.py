"""The timing harness: every call in every round, and the peak of one call alone."""

from functools import partial

import numpy as np
import torch

from granulon.evaluation.timing import interleaved, milliseconds, peak_bytes, times, with_quartiles


def test_a_round_makes_every_call_once_and_warm_up_does_not_count():
    made = []
    calls = {name: partial(made.append, name) for name in "abc"}
    seconds = interleaved(calls, rounds=5, warm_up=2)
    rounds = [made[start : start + 3] for start in range(0, len(made), 3)]
    assert len(rounds) == 7 and all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({"".join(names) for names in rounds}) > 1, "the order differs between rounds"
    assert all(len(values) == 5 and min(values) >= 0 for values in seconds.values())


def test_the_peak_is_what_a_call_holds_at_once():
    kept = torch.ones(10_000_000)
    assert 12e6 <= peak_bytes(lambda: [torch.ones(1_000_000) for _ in range(3)]) < 13e6
    assert 4e6 <= peak_bytes(lambda: [torch.ones(1_000_000).sum() for _ in range(3)]) < 5e6
    assert len(kept) == 10_000_000


def test_a_median_stands_beside_its_quartiles():
    values_R = np.array([0.005, 0.001, 0.002, 0.003, 0.004])
    assert with_quartiles(values_R) == "3.00 [2.00, 4.00]"
    assert with_quartiles(1000 * values_R, times) == "3.00x [2.00x, 4.00x]"


def test_times_have_three_digits():
    assert [milliseconds(seconds) for seconds in (0.000123, 0.00123, 0.0123, 1.234)] == [
        "0.123",
        "1.23",
        "12.3",
        "1234",
    ]
