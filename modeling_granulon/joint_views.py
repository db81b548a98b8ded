"""Where image tokens stand in a prompt, which of them each view shows, and three views packed in one pass (Eq. 8-10).

An image takes a span of placeholders: N pixel slots, then K semantic slots ("full"), or one of the groups alone. A
slot's role follows from its rank in the span, so that one placeholder id serves both. Torch only.

Shapes: B rows, T prompt tokens, R image slots of the longest row, I images, N pixel slots, K semantic slots,
P packed tokens.
"""

from typing import NamedTuple

import torch

FULL, PIXEL, SEMANTIC = VIEW_ORDER = "full", "pixel", "semantic"
TEXT_ROLE, PIXEL_ROLE, SEMANTIC_ROLE = 0, 1, 2
HIDDEN_ROLE = {FULL: -1, PIXEL: SEMANTIC_ROLE, SEMANTIC: PIXEL_ROLE}


class SlotLayout(NamedTuple):
    """Row by row, in the order of the prompt, the image slots that stand in it.

    index_BR: long, place of the slot in the flattened (I * (N + K)) image tokens; 0 beyond the row's last slot.
    role_BR: long, PIXEL_ROLE or SEMANTIC_ROLE; TEXT_ROLE beyond the row's last slot.
    images_per_row: images of each row.
    """

    index_BR: torch.Tensor
    role_BR: torch.Tensor
    images_per_row: list[int]


def view_lengths(num_pixel: int, num_semantic: int) -> dict[str, int]:
    """Placeholders per image in each view; the pixel view comes first where it is as long as another one."""
    lengths = {PIXEL: num_pixel, FULL: num_pixel + num_semantic, SEMANTIC: num_semantic}
    return {view: length for view, length in lengths.items() if length}


def slot_layout(
    placeholder_BT: torch.Tensor, num_images: int, num_pixel: int, num_semantic: int, view: str | None = None
) -> SlotLayout:
    """Match placeholders and images, row by row (the sequence of Eq. 8).

    Args:
        placeholder_BT: bool, the image placeholders of each prompt.
        num_images, num_pixel, num_semantic: I, N and K.
        view: the requested view, which settles what a span is where N = K.

    Raises:
        ValueError: naming the first row whose placeholders are not whole spans, or the total that does not fit.
    """
    counts = placeholder_BT.sum(-1).tolist()
    lengths = view_lengths(num_pixel, num_semantic)
    misfit = {name: abs(length * num_images - sum(counts)) for name, length in lengths.items()}
    span_view = view if misfit.get(view) == 0 else min(misfit, key=misfit.get)
    span = lengths[span_view]
    _check_spans(placeholder_BT, counts, num_images, span, f"{span} ({span_view} view)")
    images_per_row = [count // span for count in counts]

    device = placeholder_BT.device
    rank_R = torch.arange(max(counts), device=device)
    images_B1 = torch.tensor(images_per_row, device=device).unsqueeze(-1)
    first_image_B1 = images_B1.cumsum(0) - images_B1
    slot_R = rank_R % span + (num_pixel if span_view == SEMANTIC else 0)
    index_BR = (first_image_B1 + rank_R // span) * (num_pixel + num_semantic) + slot_R
    role_BR = torch.where(slot_R < num_pixel, PIXEL_ROLE, SEMANTIC_ROLE).expand(len(counts), -1)
    used_BR = rank_R < images_B1 * span
    return SlotLayout(index_BR * used_BR, role_BR * used_BR, images_per_row)


def _check_spans(placeholder_BT: torch.Tensor, counts: list[int], num_images: int, span: int, needed: str):
    remedy = "; pass the processor's output unchanged, one image per placeholder, or raise max_length"
    for row, count in enumerate(counts):
        if count % span:
            raise ValueError(f"row {row} has {count} image tokens, but every image needs {needed}{remedy}")
    if sum(counts) != span * num_images:
        images = [count // span for count in counts]
        raise ValueError(f"the rows ask for {images} images at {needed} each, but {num_images} were passed{remedy}")
    rank_BT = placeholder_BT.long().cumsum(-1)
    last_BT = placeholder_BT & ~torch.nn.functional.pad(placeholder_BT[:, 1:], (0, 1))
    broken_B = (last_BT & (rank_BT % span != 0)).any(-1)
    if broken_B.any():
        row = broken_B.tolist().index(True)
        raise ValueError(f"row {row} has an image span that is broken; every image needs {needed} in a row{remedy}")


def refuse_lone_placeholders(placeholder_BT: torch.Tensor):
    """Raises ValueError for prompts with image tokens and no images."""
    for row, count in enumerate(placeholder_BT.sum(-1).tolist()):
        if count:
            raise ValueError(f"row {row} has {count} image tokens but no pixel_values were passed; pass its images")


def slot_roles(placeholder_BT: torch.Tensor, role_BR: torch.Tensor) -> torch.Tensor:
    """Role of every prompt token: TEXT_ROLE, PIXEL_ROLE or SEMANTIC_ROLE, (B,T)."""
    return gather_slots(placeholder_BT, role_BR) * placeholder_BT


def gather_slots(placeholder_BT: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values of the row-aligned slots, (B,R) or (B,R,E), brought to their placeholders, (B,T) or (B,T,E)."""
    return take(values, (placeholder_BT.long().cumsum(-1) - 1).clamp(0, values.shape[1] - 1))


def visible_roles(role: torch.Tensor, views: list[str]) -> torch.Tensor:
    """Which slots each row's view shows: (B,...) roles and one view per row give a mask of the same shape."""
    hidden_B = torch.tensor([HIDDEN_ROLE[view] for view in views], device=role.device)
    return role != hidden_B.view(-1, *[1] * (role.dim() - 1))


def positions(mask_BT: torch.Tensor) -> torch.Tensor:
    """Position ids that skip holes and padding, so that neither moves a token: (B,T) long."""
    return (mask_BT.long().cumsum(-1) - 1).clamp_min(0)


def hide_slots(
    attention_mask: torch.Tensor | None, placeholder_BT: torch.Tensor, visible_BR: torch.Tensor
) -> torch.Tensor:
    """The attention mask with holes where an image slot is empty or hidden by the view.

    A (B, past + T) mask keeps its past; a 4-D mask is the caller's own and stays as it is.
    """
    hidden_BT = placeholder_BT & ~gather_slots(placeholder_BT, visible_BR.to(placeholder_BT.device))
    if attention_mask is None:
        return (~hidden_BT).long()
    if attention_mask.dim() != 2:
        return attention_mask
    past = attention_mask.shape[1] - hidden_BT.shape[1]
    return attention_mask.masked_fill(torch.nn.functional.pad(hidden_BT, (past, 0)), 0)


def compact(keep_BT: torch.Tensor, pad_left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring the kept tokens of each row together, in their order; L is the longest row.

    Returns:
        index (B,L) of the token that moves to each place, and valid (B,L) bool, False on padding.
    """
    length = int(keep_BT.sum(-1).max())
    if pad_left:
        index_BL = keep_BT.long().argsort(dim=-1, stable=True)[:, keep_BT.shape[1] - length :]
    else:
        index_BL = (~keep_BT).long().argsort(dim=-1, stable=True)[:, :length]
    return index_BL, keep_BT.gather(1, index_BL)


def kept_last(mask_IK: torch.Tensor) -> torch.Tensor:
    """Order (I,K) that puts the first, used slots behind the empty ones, so that text follows a real token."""
    slot_K = torch.arange(mask_IK.shape[1], device=mask_IK.device)
    return (slot_K + mask_IK.sum(-1, keepdim=True)) % max(mask_IK.shape[1], 1)


def take(values: torch.Tensor, index_BL: torch.Tensor) -> torch.Tensor:
    """Values (B,T) or (B,T,E) at the given places, (B,L) or (B,L,E)."""
    return values.gather(1, index_BL if values.dim() == 2 else index_BL.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


class PackedViews(NamedTuple):
    """One sequence that holds the full prompt and what the two partial views see differently.

    source_BP: long, the prompt token that each packed token copies.
    view_BP: long, 0 full, 1 pixel, 2 semantic, -1 padding.
    mask_BPP: bool, who may look at whom; every token at least at itself.
    position_ids_BP: long, a token's place within its own view.
    scored_BP: bool, whether the token may carry a label: the token before it is its predecessor in its own view.
    """

    source_BP: torch.Tensor
    view_BP: torch.Tensor
    mask_BPP: torch.Tensor
    position_ids_BP: torch.Tensor
    scored_BP: torch.Tensor

    def labels(self, labels_BT: torch.Tensor) -> torch.Tensor:
        """The prompt's labels on the packed sequence, (B,P), for the usual shift by one; -100 where none counts."""
        return take(labels_BT, self.source_BP).masked_fill(~self.scored_BP, -100)

    def predictors(self, index_BL: torch.Tensor, view: str) -> torch.Tensor:
        """Where the tokens stand that predict the given prompt tokens in a view, (B,L) places in the packed sequence.

        What a partial view shares with the full one is predicted there, as are all tokens of a row without images.
        """
        copied_BP = self.scored_BP & (self.view_BP == VIEW_ORDER.index(view))
        place_BP = torch.arange(copied_BP.shape[1], device=copied_BP.device).expand_as(copied_BP)
        # A token's place is the last one that copies it in this view, and its own in the full row otherwise.
        own_BP = place_BP.scatter_reduce(1, self.source_BP, place_BP * copied_BP, "amax")
        return (own_BP.gather(1, index_BL) - 1).clamp_min(0)


def pack_views(
    role_BT: torch.Tensor, mask_BT: torch.Tensor, partial_views: tuple[str, ...] = (PIXEL, SEMANTIC)
) -> PackedViews:
    """The joint likelihood's views in one pass (Eq. 9, 10).

    The full rows come first. A partial view shares what stands before its first hidden slot, so only the rest is
    copied, led by the last shared token, which predicts the first copied one. Rows without images get no copies.

    Args:
        role_BT: long, from `slot_roles`.
        mask_BT: 1 on tokens that the full view sees: no padding, no unused semantic slot.
        partial_views: those that are packed behind the full one.
    """
    mask_BT = mask_BT.bool()
    token_T = torch.arange(role_BT.shape[1], device=role_BT.device)
    copies = [_view_copy(role_BT, mask_BT, HIDDEN_ROLE[view]) for view in partial_views]
    source = torch.cat([token_T.expand_as(role_BT), *(copy[0] for copy in copies)], dim=1)
    valid = torch.cat([mask_BT, *(copy[1] for copy in copies)], dim=1)
    position_ids = torch.cat([positions(mask_BT), *(copy[2] for copy in copies)], dim=1)
    widths = torch.tensor([role_BT.shape[1], *(copy[0].shape[1] for copy in copies)], device=role_BT.device)
    block_P = torch.arange(len(widths), device=role_BT.device).repeat_interleave(widths, output_size=source.shape[1])
    no_start_B = torch.zeros_like(role_BT[:, 0])
    starts_BV = torch.stack([no_start_B, *(copy[3] for copy in copies)], dim=1)

    same_view_PP = block_P.unsqueeze(1) == block_P
    before_BPP = source.unsqueeze(1) <= source.unsqueeze(2)
    shared_BPP = (block_P == 0) & (source.unsqueeze(1) < starts_BV[:, block_P].unsqueeze(2))
    mask_BPP = valid.unsqueeze(1) & before_BPP & (same_view_PP | shared_BPP)
    mask_BPP |= torch.eye(source.shape[1], dtype=torch.bool, device=source.device)
    view_V = torch.tensor([VIEW_ORDER.index(view) for view in (FULL, *partial_views)], device=role_BT.device)
    view_BP = view_V[block_P].expand_as(source).masked_fill(~valid, -1)
    follows_BP = torch.nn.functional.pad(view_BP[:, 1:] == view_BP[:, :-1], (1, 0))
    return PackedViews(source, view_BP, mask_BPP, position_ids, valid & follows_BP)


def _view_copy(role_BT: torch.Tensor, mask_BT: torch.Tensor, hidden_role: int):
    """What a view that hides one role sees differently: source, valid and positions (B,C), first copied token (B,)."""
    seen_BT = mask_BT & (role_BT != hidden_role)
    after_BT = (role_BT == hidden_role).cumsum(-1) > 0
    token_T = torch.arange(role_BT.shape[1], device=role_BT.device)
    # The last token seen before the first hidden slot; rows that hide nothing copy nothing.
    lead_B = torch.where(seen_BT & ~after_BT, token_T, -1).amax(-1)
    copied_BT = seen_BT & (after_BT | (token_T == lead_B.unsqueeze(-1))) & after_BT.any(-1, keepdim=True)
    index_BC, valid_BC = compact(copied_BT)
    return index_BC, valid_BC, take(positions(seen_BT), index_BC), lead_B.clamp_min(0)
