"""The benchmarks run and report: their quick form, on the smallest shapes, and what they say about a goal."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    "name, rows",
    [
        ("aggregation", ["196 x 2", "ToMe, whole", "20 clusters"]),
        (
            "inference",
            ["tower", "controller", "relation map", "AdaTA, coarse", "prefill, semantic", "first token, full"],
        ),
        ("training", ["plain fine-tuning", "separate passes", "packed views, every level"]),
        ("conversations", ["an answer per row, at random", "a conversation per row, by length"]),
        ("loading", ["restart"]),
    ],
)
def test_quick_form_prints_a_table_of_numbers(name, rows):
    run = [sys.executable, BENCHMARKS / f"{name}.py", "--quick"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    measured = {entries[0]: entries[1].split()[0].rstrip("x").replace(",", "") for entries in lines}
    for row in rows:
        assert float(measured[row]) > 0, row
    assert f"`python benchmarks/{name}.py --quick`" in done.stdout


@pytest.fixture
def inference(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import inference

    return inference


def seconds(controller=0.001, semantic=0.1, first_token=1.1):
    """Tower and full prefill take 2 s together."""
    return {
        "tower": 1.0, "prefill, full": 1.0, "prefill, pixel": 1.0, "prefill, semantic": semantic,
        "decode step, semantic": 0.05, "controller": controller, "relation map": 0.002, "AdaTA, fine": 0.002,
        "first token, full": 2.0, "first token, pixel": 2.0, "first token, semantic": first_token,
    }  # fmt: skip


def test_a_goal_is_met_only_by_what_was_measured(inference):
    lengths = {"full": 800, "semantic": 40}
    assert all(": met." in line for line in inference.verdicts(448, seconds(), lengths, ["fine"]))
    slow = seconds(controller=0.017, semantic=0.11, first_token=2.5)
    share, ratio, end = inference.verdicts(448, slow, lengths, ["fine"])
    assert "1.05% of tower and prefill (fine), goal 1%: not met" in share
    assert "leaves 20.0 ms; controller takes 17.0 ms" in share
    assert "9.09x, goal 10x: not met" in ratio and "20.0x" in ratio and "45% of the semantic prefill" in ratio
    assert "is 0.800x, goal 1x: not met" in end


def test_a_training_step_is_judged_by_its_median_ratio(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import training

    result = {
        "patches": 196, "views": 5, "vocabulary": 1000, "head_products": 20,
        "seconds": {training.PLAIN: np.array([1.0, 2.0, 1.0]), training.PACKED: np.array([1.8, 3.6, 9.0])},
        "products": {training.PLAIN: 100, training.PACKED: 260},
    }  # fmt: skip
    line = training.verdict(result)
    assert "1.80x, goal 1.9x: met. " in line and "20% of those" in line and "2.60x with the head and 2.00x" in line
    assert "goal 1.5x: not met. " in training.verdict(result | {"patches": 784})


def test_compiled_rounds_do_not_change_what_the_rivals_find(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import baselines

    features = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))
    for kmeans, one_round in (
        (baselines.authors_kmeans, baselines.authors_kmeans_round),
        (baselines.fast_pytorch_kmeans, baselines.fast_pytorch_kmeans_round),
    ):
        compiled = torch.compile(one_round, fullgraph=True, dynamic=False)
        for one, other in zip(kmeans(features, 4)[1], kmeans(features, 4, compiled)[1], strict=True):
            assert torch.equal(one, other) and len(one.unique()) == 4


def test_a_size_that_the_patch_does_not_divide_is_refused(inference, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["inference.py", "--sizes", "224", "230"])
    with pytest.raises(SystemExit):
        inference.main()
    assert "[230]: a size must be a multiple of the patch size, 16" in capsys.readouterr().err
