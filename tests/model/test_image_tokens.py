"""Placeholders and views: spans, roles, masks."""

import pytest
import torch

from modeling_granulon.image_tokens import (
    PIXEL_ROLE,
    SEMANTIC_ROLE,
    compact,
    hide_slots,
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
        ([[1, 1, 0, 1, 1, 1]], 1, "row 0 has an interrupted image span"),
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


@pytest.mark.parametrize("pad_left", [False, True])
def test_compacting_keeps_the_order_of_what_is_kept(pad_left):
    keep = spans([1, 0, 1, 1], [0, 0, 1, 0])
    index, valid = compact(keep, pad_left)
    tokens = torch.arange(4).expand(2, -1)
    kept = [row[ok].tolist() for row, ok in zip(take(tokens, index), valid, strict=True)]
    assert kept == [[0, 2, 3], [2]]
    assert valid[1].tolist() == ([False, False, True] if pad_left else [True, False, False])
