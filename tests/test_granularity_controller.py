"""The controller reads the question, and only the question (Eq. 1-3)."""

import pytest
import torch
from conftest import ask, make_image, make_inputs, make_model, make_processor

from modeling_granulon.granularity_controller import choose_granularity, first_layer_states


def test_first_layer_states_are_the_language_models_own(model):
    language_model = model.model.language_model
    ids = torch.randint(0, 200, (2, 7))
    states = first_layer_states(language_model, ids, torch.ones_like(ids))
    own = language_model(ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(states, own)


def test_padding_of_the_question_does_not_change_the_logits(model):
    controller, language_model = model.model.granularity_controller, model.model.language_model
    ids, mask = torch.randint(0, 200, (1, 5)), torch.ones(1, 5, dtype=torch.long)
    padded = torch.cat([ids, torch.full((1, 4), 256)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    alone = controller(first_layer_states(language_model, ids, mask), mask)
    together = controller(first_layer_states(language_model, padded, padded_mask), padded_mask)
    torch.testing.assert_close(alone, together)


def test_the_choice_is_hard_and_the_weights_are_soft():
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    index, weights = choose_granularity(logits)
    assert index.tolist() == [1, 0]
    torch.testing.assert_close(weights, logits.softmax(-1))


def test_a_given_level_is_chosen_with_certainty_and_leaves_other_rows_alone():
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    index, weights = choose_granularity(logits, torch.tensor([0, -1]))
    assert index.tolist() == [0, 0]
    assert weights[0].tolist() == [1.0, 0.0]
    torch.testing.assert_close(weights[1], logits[1].softmax(-1))


def test_the_level_depends_on_the_question_and_not_on_the_image(model, processor):
    questions = ["what is it?", "zzzz zzzz zzzz", "A", "how many small marks are there?"]
    images = [[make_image(0)]] * 4
    logits = model.explain(**make_inputs(processor, questions, images)).granularity_logits
    other = model.explain(**make_inputs(processor, questions, [[make_image(7)]] * 4)).granularity_logits
    torch.testing.assert_close(logits, other)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_the_latest_user_turn_conditions_the_controller(model, processor):
    first = ask("what is it?") + [{"role": "assistant", "content": "a dog"}, {"role": "user", "content": "how many?"}]
    text = processor.apply_chat_template(first, add_generation_prompt=True)
    inputs = processor(text=[text], images=[[make_image(0)]], return_tensors="pt")
    alone = make_inputs(processor, ["how many?"], [[make_image(0)]])
    assert torch.equal(inputs["question_input_ids"], alone["question_input_ids"])
    logits = [model.explain(**batch).granularity_logits for batch in (inputs, alone)]
    torch.testing.assert_close(*logits)


def test_a_row_without_a_question_takes_the_default_level(model, processor):
    inputs = make_inputs(processor, ["what?", ""], [[make_image(0)], [make_image(1)]])
    assert inputs["question_attention_mask"][1].sum() == 0
    default = model.config.granularity_index(model.config.default_granularity)
    assert model.explain(**inputs).granularity_index[1] == default
    without = {name: value for name, value in inputs.items() if not name.startswith("question")}
    assert model.explain(**without).granularity_index.tolist() == [default, default]


@pytest.mark.parametrize("granularity, expected", [("coarse", [0, 0]), (1, [1, 1]), (["fine", 0], [1, 0])])
def test_a_forced_level_overrides_the_controller(model, processor, granularity, expected):
    inputs = make_inputs(processor, ["what?", "how?"], [[make_image(0)], [make_image(1)]])
    assert model.explain(**inputs, granularity=granularity).granularity_index.tolist() == expected


@pytest.mark.parametrize("granularity", ["finest", 5, ["fine"], ["fine", "x"]])
def test_an_impossible_level_is_refused(model, processor, granularity):
    inputs = make_inputs(processor, ["what?", "how?"], [[make_image(0)], [make_image(1)]])
    with pytest.raises(ValueError, match="granularit"):
        model.explain(**inputs, granularity=granularity)


def test_the_loss_reaches_controller_and_gains_through_the_soft_gains(model, processor):
    inputs = make_inputs(processor, ["what is it?"], [[make_image(0)]])
    controller = model.model.granularity_controller
    with torch.no_grad():
        controller.linear_2.weight.mul_(1e-3)
        model.model.multi_modal_projector.gains.copy_(torch.tensor([[0.5, 1.5], [1.2, 0.8]]))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert controller.projection.weight.grad.abs().sum() > 0
    assert model.model.multi_modal_projector.gains.grad.abs().sum() > 0


@pytest.mark.parametrize("controller, expected", [("fine", {1}), ("coarse", {0}), ("random", {0, 1})])
def test_ablations_take_a_fixed_or_a_random_level(controller, expected):
    model, processor = make_model(controller=controller), make_processor()
    assert model.model.granularity_controller is None
    inputs = make_inputs(processor, ["what?"] * 16, [[make_image(0)]] * 16)
    torch.manual_seed(0)
    assert set(model.explain(**inputs).granularity_index.tolist()) == expected
