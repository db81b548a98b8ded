"""Measured labels: each level has the likelihood of a pass with the level forced, for one tower pass in all."""

import logging
import math

import pytest
import torch
from conftest import count_calls, make_image, make_model, make_processor

from granulon.train.collator import GranulonCollator
from granulon.train.controller.corpus import check_rows
from granulon.train.controller.measure import answer_nll, compare_levels, measure_rows

ANSWERS = ["a dog", "two large cats on a sofa", "no", "blue, and then some more words", "x"]


def make_rows(images=(1, 2, 1, 1, 3)):
    rows = []
    for number, (answer, count) in enumerate(zip(ANSWERS, images, strict=True)):
        text = {"type": "text", "text": f"question {'long ' * (number % 3)}{number}?"}
        rows.append(
            {
                "prompt": [{"role": "user", "content": [{"type": "image"}] * count + [text]}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
                "images": [make_image(10 * number + seed) for seed in range(count)],
                "granularity": None,
            }
        )
    return rows


def forced_nll(model, inputs, level, view):
    """What a user computes: one forward pass with the level forced, and the answer's tokens read off the logits."""
    inputs = {name: value for name, value in inputs.items() if name != "granularity_labels"}
    labels = inputs.pop("labels")
    with torch.no_grad():
        log_probs = model(**inputs, granularity=level, visual_view=view).logits[:, :-1].float().log_softmax(-1)
    target, scored = labels[:, 1:].clamp_min(0), labels[:, 1:] != -100
    return -(log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1) * scored).sum(-1)


@pytest.mark.parametrize("view", ["semantic", "full"])
@pytest.mark.parametrize("decoder", ["qwen2", "llama"])
@pytest.mark.parametrize("tower", ["dinov3", "clip", "dinov3_convnext"])
def test_every_level_has_the_likelihood_of_a_pass_with_the_level_forced(tower, decoder, view):
    if tower == "dinov3_convnext":
        model, processor = make_model(tower, decoder), make_processor(image_size=96, patch_size=32)
    else:
        model, processor = make_model(tower, decoder), make_processor()
    inputs = GranulonCollator(processor, completion_only_loss=True)(make_rows())
    assert (inputs["attention_mask"] == 0).any()
    nll, answer_tokens, _ = answer_nll(model, inputs, view)
    assert answer_tokens.tolist() == (inputs["labels"] != -100).sum(-1).tolist()
    for level, name in enumerate(model.config.granularity_names):
        expected = forced_nll(model, inputs, name, view)
        torch.testing.assert_close(nll[:, level], expected, rtol=1e-5, atol=1e-5)
    assert (nll[:, 0] - nll[:, 1]).abs().min() > 1e-3


@pytest.mark.parametrize("view", ["semantic", "full"])
def test_the_tokens_of_a_level_are_those_that_the_model_sees(view):
    model, processor = make_model(), make_processor()
    inputs = GranulonCollator(processor, completion_only_loss=True)(make_rows())
    _, _, visual_tokens = answer_nll(model, inputs, view)
    for level, name in enumerate(model.config.granularity_names):
        seen = model.explain(**{k: inputs[k] for k in ("pixel_values", "input_ids")}, granularity=name)
        assert visual_tokens[:, level].tolist() == [sum(row["tokens"].values()) for row in seen.describe(view)]


def test_one_answer_runs_each_part_once():
    """Per batch, whatever the number of levels; the controller is not asked, and the aggregation runs per level."""
    model, processor = make_model(), make_processor()
    calls = count_calls(model)
    list(measure_rows(model, processor, make_rows()))
    assert calls == {"vision_tower": 1, "granularity_controller": 0, "aggregation": 2}


def test_the_tower_runs_once_per_image_for_all_levels_and_all_rows_of_a_batch():
    model, processor, seen = make_model(), make_processor(), []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    rows = make_rows()
    rows[3]["images"] = rows[0]["images"]
    shared = list(measure_rows(model, processor, rows))
    assert seen == [7]
    alone = list(measure_rows(model, processor, rows, batch_size=1))
    for one, other in zip(shared, alone, strict=True):
        assert one["answer_nll"] == pytest.approx(other["answer_nll"], abs=1e-4)
        assert one["id"] == other["id"]


def test_rows_are_corpus_rows_with_the_probabilities_of_the_formula():
    model, processor = make_model(), make_processor()
    rows = make_rows()
    rows[0] |= {"split": "test_kinds", "kind": "animals"}
    measured = list(measure_rows(model, processor, rows, temperature=2.0, cost_per_token=0.1))
    names = model.config.granularity_names
    for row in measured:
        score = [math.exp(-row["answer_nll"][name] / 2.0 - 0.1 * row["visual_tokens"][name]) for name in names]
        expected = {name: value / sum(score) for name, value in zip(names, score, strict=True)}
        assert row["level_probs"] == pytest.approx(expected, abs=1e-4)
        assert row["level"] == max(expected, key=expected.get)
        assert row["source"] == "measured"
        assert (row["annotator"]["temperature"], row["annotator"]["view"]) == (2.0, "semantic")
    assert [row["question"] for row in measured][:2] == ["question 0?", "question long 1?"]
    assert measured[0]["split"] == "test_kinds" and measured[0]["kind"] == "animals"
    checked = check_rows(measured, names)
    assert [row["level"] for row in checked] == [row["level"] for row in measured]


def test_a_cost_per_token_lets_the_cheapest_level_win():
    model, processor = make_model(), make_processor()
    free = list(measure_rows(model, processor, make_rows()))
    dear = list(measure_rows(model, processor, make_rows(), cost_per_token=1e3))
    assert {row["level"] for row in dear} == {"coarse"}
    assert [row["answer_nll"] for row in free] == [row["answer_nll"] for row in dear]


def test_rows_of_one_image_share_a_split_and_differ_in_id():
    model, processor = make_model(), make_processor()
    rows = make_rows((1, 1, 1, 1, 1))
    for row in rows:
        row["images"] = rows[0]["images"]
    measured = list(measure_rows(model, processor, rows))
    assert len({row["split"] for row in measured}) == 1
    assert len({row["id"] for row in measured}) == 5


def test_rows_without_images_are_left_out_and_counted(caplog):
    model, processor = make_model(), make_processor()
    with caplog.at_level(logging.WARNING, logger="granulon.train.controller.measure"):
        measured = list(measure_rows(model, processor, make_rows((1, 0, 1, 0, 1)), batch_size=2))
    assert len(measured) == 3
    assert "2 of 5 rows have no image" in caplog.text


def test_bad_input_is_refused_with_the_row_and_the_remedy():
    model, processor, rows = make_model(), make_processor(), make_rows()
    with pytest.raises(ValueError, match="temperature is 0"):
        measure_rows(model, processor, rows, temperature=0)
    with pytest.raises(ValueError, match="view is 'auto'"):
        measure_rows(model, processor, rows, view="auto")
    with pytest.raises(ValueError, match="needs two or more"):
        measure_rows(make_model(granularities=[]), processor, rows)
    with pytest.raises(ValueError, match="no rows to measure"):
        list(measure_rows(model, processor, []))
    with pytest.raises(ValueError, match="row 1 has no completion"):
        list(measure_rows(model, processor, [rows[0], {"prompt": rows[1]["prompt"], "images": []}]))
    rows[2]["completion"][0]["content"] = " "
    with pytest.raises(ValueError, match="row 2 has no answer"):
        list(measure_rows(model, processor, rows))


def test_an_answer_whose_likelihood_is_not_finite_is_named():
    model, processor = make_model(), make_processor()
    model.lm_head.weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="rows 2 to 3"):
        rows = measure_rows(model, processor, make_rows((0, 0, 1, 1, 1)), batch_size=2)
        list(rows)


def measured_row(coarse, fine):
    return {"answer_nll": {"coarse": coarse, "fine": fine}, "visual_tokens": {"coarse": 10, "fine": 30}}


def test_chosen_levels_stand_between_the_oracle_and_the_fixed_levels():
    rows = [measured_row(1.0, 2.0), measured_row(4.0, 1.0), measured_row(3.0, 3.5), measured_row(5.0, 0.5)]
    report = compare_levels(rows, ["coarse", "fine", "fine", "fine"])
    assert report["best_fixed"] == "fine"
    assert report["chosen"][0] == pytest.approx((1 + 1 + 3.5 + 0.5) / 4)
    assert report["fixed"]["coarse"][0] == pytest.approx(13 / 4) and report["fixed"]["fine"][0] == pytest.approx(7 / 4)
    assert report["oracle"][0] == pytest.approx((1 + 1 + 3 + 0.5) / 4)
    difference, low, high = report["chosen_minus_best_fixed"]
    assert difference == pytest.approx(-0.25) and low <= difference <= high
    assert report["image_tokens"] == {"chosen": 25, "coarse": 10, "fine": 30}
    assert report["shares"]["oracle"] == {"coarse": 0.5, "fine": 0.5}
    for chosen in (["coarse"] * 4, ["fine"] * 4):
        assert compare_levels(rows, chosen)["chosen"][0] >= report["oracle"][0]


def test_a_comparison_of_what_was_not_measured_is_refused():
    rows = [measured_row(1.0, 2.0)]
    with pytest.raises(ValueError, match=r"\['huge'\]; the rows were measured at \['coarse', 'fine'\]"):
        compare_levels(rows, ["huge"])
    with pytest.raises(ValueError, match="1 measured rows and 0 chosen"):
        compare_levels(rows, [])
    with pytest.raises(ValueError, match="no answer_nll"):
        compare_levels([{"level": "fine"}], ["fine"])
