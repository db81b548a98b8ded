"""The controller reads the question, and only the question (Eq. 1-3)."""

import pytest
import torch
from conftest import DECODER, ask, make_image, make_inputs, make_model, make_processor
from transformers import AutoConfig, AutoModel

from modeling_granulon.granularity_controller import GranularityController, choose_granularity, question_states

DEPTH = 4
OWN_SETTINGS = {
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "qwen3": {"head_dim": 8},
    "smollm3": {"no_rope_layer_interval": 2},
}


def make_decoder(name):
    torch.manual_seed(0)
    settings = DECODER | {"num_hidden_layers": DEPTH} | OWN_SETTINGS.get(name, {})
    decoder = AutoModel.from_config(AutoConfig.for_model(name, **settings)).eval()
    for parameter in decoder.parameters():  # norms too, so that none passes for an identity
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def make_questions():
    """Ids and mask of two questions, the second padded on the right."""
    ids, mask = torch.randint(0, 200, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return ids, mask


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "olmo2"])
def test_question_states_are_the_hidden_states_of_the_decoder_itself(name):
    decoder, (ids, mask) = make_decoder(name), make_questions()
    states = [question_states(decoder, ids, mask, layers) for layers in range(1, DEPTH)]
    own = decoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for layers, states_BTE in enumerate(states, 1):
        torch.testing.assert_close(states_BTE[mask.bool()], own[layers][mask.bool()])


@pytest.mark.parametrize("name", ["llama", "smollm3"])
def test_question_states_compile_to_one_graph(name):
    decoder, (ids, mask) = make_decoder(name), make_questions()
    compiled = torch.compile(question_states, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(decoder, ids, mask, 2), question_states(decoder, ids, mask, 2))


def test_no_layer_beyond_those_that_are_read_runs():
    decoder, (ids, mask) = make_decoder("llama"), make_questions()
    ran = []
    for number, layer in enumerate(decoder.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    question_states(decoder, ids, mask, 2)
    assert ran == [0, 1]


def test_gradients_flow_through_the_layers_unless_the_caller_stops_them():
    decoder, (ids, mask) = make_decoder("llama"), make_questions()
    assert not question_states(decoder, ids, mask, 1).detach().requires_grad
    for checkpointing in (False, True):
        decoder.train()
        if checkpointing:
            decoder.gradient_checkpointing_enable()
        decoder.zero_grad()
        question_states(decoder, ids, mask, 2).sum().backward()
        read = [layer.mlp.down_proj.weight.grad is not None for layer in decoder.layers]
        assert read == [True, True, False, False]


@pytest.mark.parametrize("layers", [1, 2])
def test_padding_of_the_question_does_not_change_the_logits(model, layers):
    controller, language_model = model.model.granularity_controller, model.model.language_model
    ids, mask = torch.randint(0, 200, (1, 5)), torch.ones(1, 5, dtype=torch.long)
    padded = torch.cat([ids, torch.full((1, 4), 256)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    alone = controller(question_states(language_model, ids, mask, layers), mask)
    together = controller(question_states(language_model, padded, padded_mask, layers), padded_mask)
    torch.testing.assert_close(alone, together)


def test_the_scale_and_offset_of_the_states_do_not_change_the_logits():
    torch.manual_seed(0)
    controller = GranularityController(16, 8, 3, "gelu")
    states, mask = torch.randn(2, 5, 16), torch.ones(2, 5)
    torch.testing.assert_close(controller(states * 1000 + 50, mask), controller(states, mask), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(controller(states, mask)[0], controller(states, mask)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_question_without_tokens_gives_finite_logits(dtype):
    controller = GranularityController(16, 8, 3, "gelu").to(dtype)
    logits = controller(torch.randn(2, 5, 16, dtype=dtype), torch.zeros(2, 5))
    assert logits.isfinite().all() and logits.dtype == dtype


def test_pool_then_classify_is_the_whole_controller():
    controller, states = GranularityController(16, 8, 3, "gelu"), torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    pooled = controller.pool(states, mask)
    torch.testing.assert_close(controller.classify(pooled), controller(states, mask))
    torch.testing.assert_close(pooled[1], torch.nn.functional.layer_norm(states[1, :2], (16,)).mean(0))


def test_one_token_of_huge_scale_weighs_as_much_as_any_other():
    controller, states = GranularityController(16, 8, 3, "gelu"), torch.randn(1, 5, 16)
    huge = states.clone()
    huge[:, 0] *= 1000
    torch.testing.assert_close(controller.pool(huge, torch.ones(1, 5)), controller.pool(states, torch.ones(1, 5)))


def test_the_most_probable_level_acts():
    assert choose_granularity(torch.tensor([[0.0, 1.0], [2.0, 0.0]])).tolist() == [1, 0]


def test_a_given_level_acts_and_leaves_other_rows_alone():
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 1.0]])
    assert choose_granularity(logits, torch.tensor([0, -1, -1])).tolist() == [0, 0, 1]


def test_the_chosen_level_gives_the_same_image_tokens_as_the_same_level_forced(model, processor):
    inputs = make_inputs(processor, ["what is it?", "zzzz zzzz zzzz"], [[make_image(0)], [make_image(1)]])
    chosen = model.explain(**inputs)
    forced = model.explain(**inputs, granularity=chosen.granularity_index)
    torch.testing.assert_close(chosen.image_hidden_states, forced.image_hidden_states)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_configuration_says_how_many_layers_the_controller_reads(processor, layers):
    model = make_model(controller_layers=layers)
    inputs = make_inputs(processor, ["what is it?"], [[make_image(0)]])
    ids, mask = inputs["question_input_ids"], inputs["question_attention_mask"]
    states = question_states(model.model.language_model, ids, mask, layers)
    expected = model.model.granularity_controller(states, mask)
    torch.testing.assert_close(model.explain(**inputs).granularity_logits, expected)


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


@pytest.mark.parametrize("controller, expected", [("fine", {1}), ("coarse", {0}), ("random", {0, 1})])
def test_ablations_take_a_fixed_or_a_random_level(controller, expected):
    model, processor = make_model(controller=controller), make_processor()
    assert model.model.granularity_controller is None
    inputs = make_inputs(processor, ["what?"] * 16, [[make_image(0)]] * 16)
    torch.manual_seed(0)
    assert set(model.explain(**inputs).granularity_index.tolist()) == expected
