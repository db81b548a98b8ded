"""Scores of predicted levels agree with scikit-learn; their intervals come from whole groups of rows."""

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from granulon.train.controller.level_scores import draw_confusions, mean_interval, scores


def make_predictions(rows=200, levels=3, seed=0):
    random = np.random.default_rng(seed)
    probs_BG = random.dirichlet(np.ones(levels), rows)
    level_B = np.where(random.random(rows) < 0.6, probs_BG.argmax(1), random.integers(levels, size=rows))
    return probs_BG, level_B


def test_accuracy_macro_f1_and_confusion_are_those_of_scikit_learn():
    probs_BG, level_B = make_predictions()
    found = scores(probs_BG, level_B, [str(row) for row in range(200)])
    predicted_B = probs_BG.argmax(1)
    assert found["accuracy"][0] == pytest.approx(accuracy_score(level_B, predicted_B))
    assert found["macro_f1"][0] == pytest.approx(f1_score(level_B, predicted_B, average="macro"))
    assert found["confusion"] == confusion_matrix(level_B, predicted_B).tolist()
    assert found["groups"] == 200


def test_a_level_that_never_occurs_does_not_lower_macro_f1():
    probs_BG = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.9, 0.1, 0.0]])
    assert scores(probs_BG, np.array([0, 1, 0]), ["a", "b", "c"])["macro_f1"][0] == 1


def test_calibration_error_of_a_worked_example():
    # Two rows at 0.95, one of them right; two at 0.65, both right: |0.95 - 0.5| / 2 + |0.65 - 1| / 2.
    probs_BG = np.array([[0.95, 0.05], [0.95, 0.05], [0.35, 0.65], [0.35, 0.65]])
    found = scores(probs_BG, np.array([0, 1, 1, 1]), list("abcd"))
    assert found["ece"][0] == pytest.approx(0.4)


def test_rows_of_one_group_count_as_one_in_the_interval():
    right_B = np.repeat(np.arange(20) % 2, 10)
    probs_BG = np.stack([1 - right_B, right_B], axis=1).astype(float)
    level_B = np.ones(200, dtype=int)
    _, low, high = scores(probs_BG, level_B, [str(row) for row in range(200)])["accuracy"]
    _, group_low, group_high = scores(probs_BG, level_B, [str(row // 10) for row in range(200)])["accuracy"]
    assert 0.11 < high - low < 0.16  # 2 * 1.96 * sqrt(0.25 / 200)
    assert 0.38 < group_high - group_low < 0.5  # of 20


def test_a_mean_and_its_interval():
    mean, low, high = mean_interval(np.array([1.0, 2.0, 3.0, 6.0]), ["a", "a", "b", "b"])
    assert mean == 3 and low == 1.5 and high == 4.5
    assert mean_interval(np.array([1.0, 2.0]), ["a", "b"], seed=1) == mean_interval(
        np.array([1.0, 2.0]), ["a", "b"], seed=1
    )


def test_the_picture_holds_a_matrix_for_each_name(tmp_path):
    for count in (1, 3):
        names = {f"split {number}": [[5, 1], [0, 0]] for number in range(count)}
        draw_confusions(names, ["coarse", "fine"], tmp_path / f"{count}.png")
    one, three = (Image.open(tmp_path / f"{count}.png") for count in (1, 3))
    assert three.width > 2 * one.width and three.height == one.height
    assert len(one.convert("RGB").getcolors(1 << 24)) > 20
