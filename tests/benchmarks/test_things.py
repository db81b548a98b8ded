"""The benchmark on photographed things: what counts as found, what a patch shows, and the two halves of the stamps."""

from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture
def things(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import things

    return things


def test_a_thing_is_found_by_a_token_that_overlaps_more_than_half(things):
    shown = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0, 0, 0]])
    token = torch.tensor([[0, 0, 0, 1, 1, 1, -1, 2, 2, 2]])
    iou, share, there = things.overlaps(token, shown, 3)
    torch.testing.assert_close(iou, torch.tensor([[3 / 4, 2 / 4, 0, 0]]))
    torch.testing.assert_close(share, torch.tensor([[1, 2 / 3, 0, 0]]))
    assert there.tolist() == [[True, True, False, False]]
    np.testing.assert_allclose(things.sums_by_scene(token, shown, 3), [[2, 1, 1.25, 5 / 3]])


def test_a_patch_shows_what_covers_more_than_half_of_it(things):
    pixels = np.zeros((28, 28), int)
    pixels[:14, :8] = 1  # 8 of 14 columns of the first patch
    pixels[:14, 14:21] = 2  # just half of the second
    pixels[14:, :7], pixels[14:, 7:14] = 3, 4  # two things, half each
    assert things.majority(pixels).tolist() == [[1, 0], [0, 0]]


def test_scenes_repeat_and_their_things_are_never_hidden(things):
    if not things.STAMPS.exists():
        pytest.skip("needs the stamps of `make parts`")
    pytest.importorskip("skimage")
    halves = [set(things.stamps(half)) for half in ("tuning", "held-out")]
    assert not halves[0] & halves[1] and min(map(len, halves)) > 100
    for seed in range(5):
        drawn = [things.scene(np.random.default_rng(seed), 224, things.stamps("tuning")) for _ in range(2)]
        assert np.array_equal(drawn[0][0], drawn[1][0]) and np.array_equal(drawn[0][1], drawn[1][1])
        patches = drawn[0][1]
        assert all((patches == thing).sum() >= things.FEWEST_PATCHES for thing in range(1, patches.max() + 1))


def test_the_ratio_is_one_for_the_same_sums(things):
    sums = np.array([[2.0, 1.0, 1.2, 2.0], [1.0, 1.0, 0.7, 1.0], [3.0, 1.0, 1.5, 3.0]])
    assert things.ratio(sums, sums, things.FOUND) == ("1.00 [1.00, 1.00]", 1.0)


def test_missing_parts_are_named_with_the_remedy(things, monkeypatch, tmp_path):
    monkeypatch.setattr(things, "ROOT", tmp_path)
    monkeypatch.setattr(things, "STAMPS", tmp_path / "build/stamps")
    monkeypatch.setattr("sys.argv", ["things.py"])
    with pytest.raises(SystemExit, match="build/stamps not found; `make parts` fetches"):
        monkeypatch.setattr(things, "ENCODER", tmp_path)
        things.main()
