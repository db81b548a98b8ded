"""Placeholders, views and the packed sequence: layout, masks, positions and likelihoods."""

import pytest
import torch
from conftest import make_image, make_inputs, make_model, make_processor

from modeling_granulon.joint_views import (
    PIXEL_ROLE,
    SEMANTIC_ROLE,
    VIEW_ORDER,
    compact,
    hide_slots,
    kept_last,
    pack_views,
    slot_layout,
    slot_roles,
    take,
)


def spans(*rows):
    return torch.tensor(rows).bool()


def test_roles_follow_from_the_rank_in_the_span():
    placeholder = spans([0, 1, 1, 1, 1, 1, 0])
    layout = slot_layout(placeholder, num_images=1, num_pixel=3, num_semantic=2)
    assert layout.images_per_row == [1]
    assert slot_roles(placeholder, layout.role_BR).tolist() == [[0, 1, 1, 1, 2, 2, 0]]
    assert layout.index_BR.tolist() == [[0, 1, 2, 3, 4]]


def test_touching_images_and_rows_without_images_keep_their_order():
    placeholder = spans([1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0])
    layout = slot_layout(placeholder, num_images=3, num_pixel=2, num_semantic=1)
    assert layout.images_per_row == [2, 0, 1]
    assert layout.index_BR.tolist() == [[0, 1, 2, 3, 4, 5], [0] * 6, [6, 7, 8, 0, 0, 0]]


@pytest.mark.parametrize("length, roles", [(3, PIXEL_ROLE), (2, SEMANTIC_ROLE)])
def test_the_length_of_a_span_says_its_view(length, roles):
    placeholder = torch.ones(1, length, dtype=torch.bool)
    layout = slot_layout(placeholder, num_images=1, num_pixel=3, num_semantic=2)
    assert layout.role_BR.tolist() == [[roles] * length]
    assert layout.index_BR.tolist() == [list(range(3) if roles == PIXEL_ROLE else range(3, 5))]


@pytest.mark.parametrize(
    "rows, images, message",
    [
        ([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], 2, "row 1 has 4 image tokens"),
        ([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]], 1, "ask for .1, 1. images"),
        ([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], 2, "row 0 has 6 image tokens"),
        ([[1, 1, 0, 1, 1, 1]], 1, "row 0 has an image span that is broken"),
        ([[0, 0]], 1, "ask for .0. images"),
    ],
)
def test_placeholders_that_are_no_whole_spans_are_refused(rows, images, message):
    with pytest.raises(ValueError, match=message):
        slot_layout(spans(*rows), images, num_pixel=3, num_semantic=2)


def test_holes_stand_where_slots_are_empty_and_padding_stays():
    placeholder = spans([0, 1, 1, 1, 0])
    mask = hide_slots(torch.tensor([[0, 1, 1, 1, 1]]), placeholder, torch.tensor([[True, False, True]]))
    assert mask.tolist() == [[0, 1, 0, 1, 1]]


def test_empty_slots_come_before_the_kept_ones():
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    order = kept_last(mask)
    assert order.tolist() == [[2, 0, 1], [0, 1, 2], [1, 2, 0]]
    assert mask.gather(1, order)[:, -1].all()


@pytest.mark.parametrize("pad_left", [False, True])
def test_compacting_keeps_the_order_of_what_is_kept(pad_left):
    keep = spans([1, 0, 1, 1], [0, 0, 1, 0])
    index, valid = compact(keep, pad_left)
    tokens = torch.arange(4).expand(2, -1)
    kept = [row[ok].tolist() for row, ok in zip(take(tokens, index), valid, strict=True)]
    assert kept == [[0, 2, 3], [2]]
    assert valid[1].tolist() == ([False, False, True] if pad_left else [True, False, False])


def test_the_packed_sequence_shares_the_prefix_and_copies_only_what_differs():
    roles = torch.tensor([[0, 0, 1, 1, 2, 2, 0, 0]])
    packed = pack_views(roles, torch.ones_like(roles))
    source, view = packed.source_BP[0], packed.view_BP[0]
    assert source[view == 1].tolist() == [3, 6, 7]  # the last shared token leads, and predicts the first copied one
    assert source[view == 2].tolist() == [1, 4, 5, 6, 7]
    assert packed.position_ids_BP[0][view == 1].tolist() == [3, 4, 5]
    assert packed.position_ids_BP[0][view == 2].tolist() == [1, 2, 3, 4, 5]
    last_pixel, last_semantic = (view == 1).nonzero()[-1], (view == 2).nonzero()[-1]
    seen = lambda query: sorted(source[packed.mask_BPP[0, query.item()]].tolist())  # noqa: E731
    assert seen(last_pixel) == [0, 1, 2, 3, 6, 7]
    assert seen(last_semantic) == [0, 1, 4, 5, 6, 7]


@pytest.mark.parametrize("partial, copied", [(("pixel",), [3, 6, 7]), (("semantic",), [1, 4, 5, 6, 7]), ((), [])])
def test_only_the_wanted_views_are_packed(partial, copied):
    roles = torch.tensor([[0, 0, 1, 1, 2, 2, 0, 0]])
    packed = pack_views(roles, torch.ones_like(roles), partial)
    assert packed.source_BP[0, 8:].tolist() == copied
    assert packed.view_BP[0, 8:].tolist() == [VIEW_ORDER.index(view) for view in partial for _ in copied]


def test_a_token_is_predicted_by_the_one_before_it_in_its_view():
    roles = torch.tensor([[0, 0, 1, 1, 2, 2, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]])
    packed = pack_views(roles, torch.ones_like(roles))
    tokens = torch.tensor([[1, 6, 7], [1, 6, 7]])
    for view, before in (("full", [0, 5, 6]), ("pixel", [0, 3, 6]), ("semantic", [0, 5, 6])):
        places = packed.predictors(tokens, view)
        assert take(packed.source_BP, places).tolist() == [before, [0, 5, 6]]  # the second row has one view
        own_view = take(packed.view_BP, places)[0, 1:].tolist()
        assert own_view == [VIEW_ORDER.index(view)] * 2, "what differs is predicted by the view's own copy"


@pytest.mark.parametrize("joint_views", [True, ("pixel",), ("semantic",), False])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_predicted_states_are_those_of_separate_passes(joint_views, padding_side):
    model, processor = make_model().model, make_processor()
    images = [[make_image(0)], [make_image(1), make_image(2)], []]
    questions = ["what is it?", "and these two, long question?", "hi"]
    inputs = make_inputs(processor, questions, images, padding_side=padding_side)
    last = inputs["attention_mask"].cumsum(-1).argmax(-1, keepdim=True)
    predict = last - torch.tensor([0, 3])  # (B,2): the last token and one before it
    with torch.no_grad():
        states = model(**inputs, joint_views=joint_views, predict=predict).last_hidden_state
        views = ["full", *(("pixel", "semantic") if joint_views is True else joint_views or ())]
        alone = [
            take(model(**inputs, visual_view=None if view == "full" else view).last_hidden_state, predict - 1)
            for view in views
        ]
    torch.testing.assert_close(states, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("decoder", ["qwen2", "llama"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_packed_views_give_the_likelihoods_of_three_separate_passes(attention, decoder, padding_side):
    model, processor = make_model(decoder=decoder), make_processor()
    model.set_attn_implementation(attention)
    images = [[make_image(0)], [make_image(1), make_image(2)], []]
    inputs = make_inputs(
        processor, ["what is it?", "and these two, long question?", "hi"], images, padding_side=padding_side
    )
    mask = inputs["attention_mask"]
    last_tokens = (mask.sum(-1, keepdim=True) - mask.cumsum(-1) < 8) & mask.bool()
    labels = inputs["input_ids"].masked_fill(~last_tokens, -100)
    with torch.no_grad():
        joint = model(**inputs, joint_views=True)
    packed_labels = joint.packed_views.labels(labels)
    for number, view in enumerate(["full", "pixel", "semantic"]):
        in_view = packed_labels.masked_fill(joint.packed_views.view_BP != number, -100)
        together = row_likelihoods(joint.logits, in_view)
        with torch.no_grad():
            alone = row_likelihoods(model(**inputs, visual_view=view if number else None).logits, labels)
        with_images = slice(0, 3 if view == "full" else 2)
        torch.testing.assert_close(together[with_images], alone[with_images], atol=1e-5, rtol=1e-5)
        assert (alone != 0).all()
    assert (together[2] == 0).all(), "a row without images has one view only"


def row_likelihoods(logits, labels):
    """Log-likelihood of each row's labelled tokens, (B,)."""
    log_probs = logits[:, :-1].log_softmax(-1)
    target = labels[:, 1:]
    picked = log_probs.gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return (picked * (target != -100)).sum(-1)


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


def test_flash_attention_is_told_to_run_separate_passes():
    model, processor = make_model(), make_processor()
    inputs = make_inputs(processor, ["what is it?"], [[make_image(0)]])
    model.config.text_config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="one pass per visual_view"):
        model(**inputs, joint_views=True)
