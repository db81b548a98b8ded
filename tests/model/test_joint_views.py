"""The packed sequence: layout, masks, positions, and the states of separate passes."""

import pytest
import torch
from conftest import LEVELS, make_image, make_inputs, make_model, make_processor

from modeling_granulon.image_tokens import PIXEL_ROLE, SEMANTIC_ROLE, take
from modeling_granulon.joint_views import PartialView, pack_views

QUESTIONS = ["what is it?", "and these two, long question?", "hi"]
NAMES = [level["name"] for level in LEVELS]


def images():
    return [[make_image(0)], [make_image(1), make_image(2)], []]


def partial(roles, *hidden):
    return [PartialView(role, torch.ones_like(roles)) for role in hidden]


def test_the_packed_sequence_shares_the_prefix_and_copies_only_what_differs():
    roles = torch.tensor([[0, 0, 1, 1, 2, 2, 0, 0]])
    packed = pack_views(roles, torch.ones_like(roles), partial(roles, SEMANTIC_ROLE, PIXEL_ROLE))
    source, view = packed.source_BP[0], packed.view_BP[0]
    assert source[view == 1].tolist() == [3, 6, 7]  # the last shared token leads, and predicts the first copied one
    assert source[view == 2].tolist() == [1, 4, 5, 6, 7]
    assert packed.position_ids_BP[0][view == 1].tolist() == [3, 4, 5]
    assert packed.position_ids_BP[0][view == 2].tolist() == [1, 2, 3, 4, 5]
    assert packed.widths == [8, 3, 5]
    mask_PP = packed.mask("sdpa", torch.float32)[0, 0]
    last_pixel, last_semantic = (view == 1).nonzero()[-1], (view == 2).nonzero()[-1]
    seen = lambda query: sorted(source[mask_PP[query.item()]].tolist())  # noqa: E731
    assert seen(last_pixel) == [0, 1, 2, 3, 6, 7]
    assert seen(last_semantic) == [0, 1, 4, 5, 6, 7]


def test_a_view_copies_only_the_slots_that_it_uses():
    roles = torch.tensor([[0, 0, 1, 1, 2, 2, 0, 0]])
    view = PartialView(PIXEL_ROLE, torch.tensor([[1, 1, 1, 1, 0, 1, 1, 1]]))
    packed = pack_views(roles, torch.ones_like(roles), [view])
    assert packed.source_BP[0, 8:].tolist() == [1, 5, 6, 7]
    assert packed.position_ids_BP[0, 8:].tolist() == [1, 2, 3, 4]


def test_a_token_is_predicted_by_the_one_before_it_in_its_view():
    roles = torch.tensor([[0, 0, 1, 1, 2, 2, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]])
    packed = pack_views(roles, torch.ones_like(roles), partial(roles, SEMANTIC_ROLE, PIXEL_ROLE))
    tokens = torch.tensor([[1, 6, 7], [1, 6, 7]])
    for view, before in enumerate([[0, 5, 6], [0, 3, 6], [0, 5, 6]]):
        places = packed.predictors(tokens, view)
        assert take(packed.source_BP, places).tolist() == [before, [0, 5, 6]]  # the second row has one view
        own_view = take(packed.view_BP, places)[0, 1:].tolist()
        assert own_view == [view] * 2, "what differs is predicted by the view's own copy"


def separate_pass(model, inputs, view, chosen):
    """The hidden states of one view, computed alone."""
    if view in NAMES:
        return model(**inputs, granularity=view, visual_view="semantic").last_hidden_state
    view = None if view == "full" else view
    return model(**inputs, granularity=chosen, visual_view=view).last_hidden_state


@pytest.mark.parametrize("joint_views", [True, ("pixel",), ("semantic", "fine"), False])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("decoder", ["qwen2", "llama"])
def test_packed_states_are_those_of_separate_passes(joint_views, padding_side, attention, decoder):
    model, processor = make_model(decoder=decoder), make_processor()
    model.set_attn_implementation(attention)
    model = model.model
    inputs = make_inputs(processor, QUESTIONS, images(), padding_side=padding_side)
    last = inputs["attention_mask"].cumsum(-1).argmax(-1, keepdim=True)
    predict = last - torch.tensor([0, 3])  # (B,2): the last token and one before it
    with torch.no_grad():
        output = model(**inputs, joint_views=joint_views, predict=predict)
        views = ["full", *(["pixel", *NAMES] if joint_views is True else joint_views or [])]
        alone = [take(separate_pass(model, inputs, view, output.granularity_index), predict - 1) for view in views]
    torch.testing.assert_close(output.last_hidden_state, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)


def test_each_level_is_another_view():
    model, processor = make_model().model, make_processor()
    inputs = make_inputs(processor, QUESTIONS[:1], images()[:1])
    predict = torch.tensor([[inputs["input_ids"].shape[1] - 1]])
    states = model(**inputs, joint_views=True, predict=predict).last_hidden_state[0]
    gaps = torch.cdist(states, states) + torch.eye(len(states)) * 9
    assert gaps.min() > 1e-2


def test_a_view_masked_in_the_full_prompt_equals_the_short_prompt_of_that_view():
    model, processor = make_model(), make_processor()
    for view in ("pixel", "semantic"):
        full = make_inputs(processor, ["what is it?"], [[make_image(0)]])
        short = make_inputs(processor, ["what is it?"], [[make_image(0)]], visual_view=view)
        assert short["input_ids"].shape[1] < full["input_ids"].shape[1]
        with torch.no_grad():
            masked = model(**full, visual_view=view).logits[:, -1]
            read = model(**short).logits[:, -1]
        torch.testing.assert_close(masked, read, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_packed_is_refused():
    model, processor = make_model(), make_processor()
    inputs = make_inputs(processor, ["what is it?"], [[make_image(0)]])
    with pytest.raises(ValueError, match="joint_views takes names of .*'coarse'"):
        model(**inputs, joint_views=["huge"])
    with pytest.raises(ValueError, match="goes without visual_view"):
        model(**inputs, joint_views=True, visual_view="pixel")
    with pytest.raises(ValueError, match="GranulonTrainer computes the joint objective"):
        model(**inputs, joint_views=True, labels=inputs["input_ids"])
    model.config.text_config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="one pass per visual_view"):
        model(**inputs, joint_views=True)
