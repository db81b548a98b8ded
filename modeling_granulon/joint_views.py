"""Several views of the same prompts packed into one sequence: the joint likelihood in one pass (Eq. 9, 10).

The full rows come first. A partial view (pixel tokens alone, or the semantic tokens of one level alone) shares what
stands before its first hidden slot with the full row, so only the rest is copied behind it. A block mask lets each
copy look at itself and at what it shares. Needs torch alone.

Shapes: B rows, T prompt tokens, C tokens of a copy, L predicted tokens, V views, P packed tokens.
"""

from typing import NamedTuple

import torch

from .image_tokens import compact, positions, take

PACKABLE = "sdpa", "eager", "flex_attention"  # kinds of attention that take a mask of blocks


class PartialView(NamedTuple):
    """What a view shows of each prompt.

    hidden_role: role of the slots that it hides.
    mask_BT: 1 on the tokens that it sees, apart from the hidden role: no padding, no unused semantic slot.
    """

    hidden_role: int
    mask_BT: torch.Tensor


class PackedViews(NamedTuple):
    """One sequence that holds the full prompt and what each partial view sees differently.

    source_BP: long, the prompt token that each packed token copies.
    view_BP: long, number of the token's view: 0 full, 1 the first partial view, ...; -1 on padding.
    shared_BP: long, how many tokens of the full prompt the token may attend to beside those of its own view.
    position_ids_BP: long, a token's position within its own view.
    widths: packed tokens of each view, whose sum is P.
    """

    source_BP: torch.Tensor
    view_BP: torch.Tensor
    shared_BP: torch.Tensor
    position_ids_BP: torch.Tensor
    widths: list[int]

    def sees(self, row, query, key) -> torch.Tensor:
        """Whether one packed token may attend to another: bool, of indices that broadcast; each sees itself."""
        source, view = self.source_BP, self.view_BP
        same = view[row, query] == view[row, key]
        shared = (view[row, key] == 0) & (source[row, key] < self.shared_BP[row, query])
        before = source[row, key] <= source[row, query]
        return (view[row, key] >= 0) & before & (same | shared) | (query == key)

    def mask(self, attention: str, dtype: torch.dtype):
        """What `sees` says, as the attention of this name takes it: (B,1,P,P), or a block mask for FlexAttention."""
        rows, length = self.source_BP.shape
        device = self.source_BP.device
        if attention == "flex_attention":
            from torch.nn.attention.flex_attention import create_block_mask  # not in every build of torch

            return create_block_mask(
                lambda row, head, query, key: self.sees(row, query, key),
                *(rows, None, length, length),
                device=device,
                _compile=device.type == "cuda",  # or the mask is made in full first
            )
        place_P = torch.arange(length, device=device)
        mask = self.sees(torch.arange(rows, device=device).view(-1, 1, 1, 1), place_P.unsqueeze(-1), place_P)
        if attention != "sdpa":  # eager attention adds the mask
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        return mask

    def embed(self, embeds_VBTE: list[torch.Tensor]) -> torch.Tensor:
        """The packed sequence (B,P,E) from each view's own embeddings of the prompt, (B,T,E)."""
        sources = self.source_BP.split(self.widths, dim=1)
        return torch.cat([take(embeds, source) for embeds, source in zip(embeds_VBTE, sources, strict=True)], dim=1)

    def predictors(self, index_BL: torch.Tensor, view: int) -> torch.Tensor:
        """Places (B,L) in the packed sequence of the tokens that predict the given prompt tokens in a view.

        What a partial view shares with the full one is predicted there, as are all tokens of a row without images.
        """
        follows_BP = torch.nn.functional.pad(self.view_BP[:, 1:] == self.view_BP[:, :-1], (1, 0))
        copied_BP = follows_BP & (self.view_BP == view)
        place_BP = torch.arange(copied_BP.shape[1], device=copied_BP.device).expand_as(copied_BP)
        # A token's place is the last one that copies it in this view, and its own in the full row otherwise.
        own_BP = place_BP.scatter_reduce(1, self.source_BP, place_BP * copied_BP, "amax")
        return (own_BP.gather(1, index_BL) - 1).clamp_min(0)


def pack_views(role_BT: torch.Tensor, mask_BT: torch.Tensor, partial_views: list[PartialView]) -> PackedViews:
    """The layout of one pass over the full prompts and over each partial view (Eq. 9, 10).

    Each copy is led by the last token that it shares, which predicts the first copied one. Rows without images get no
    copies.

    Args:
        role_BT: long, from `image_tokens.slot_roles`.
        mask_BT: 1 on tokens that the full view sees: no padding, no unused semantic slot.
    """
    mask_BT = mask_BT.bool()
    token_T = torch.arange(role_BT.shape[1], device=role_BT.device)
    copies = [_view_copy(role_BT, view) for view in partial_views]
    source = torch.cat([token_T.expand_as(role_BT), *(copy[0] for copy in copies)], dim=1)
    valid = torch.cat([mask_BT, *(copy[1] for copy in copies)], dim=1)
    position_ids = torch.cat([positions(mask_BT), *(copy[2] for copy in copies)], dim=1)
    widths = [role_BT.shape[1], *(copy[0].shape[1] for copy in copies)]
    view_V = torch.arange(len(widths), device=role_BT.device)
    view_P = view_V.repeat_interleave(torch.tensor(widths, device=role_BT.device), output_size=source.shape[1])
    starts_BV = torch.stack([torch.zeros_like(role_BT[:, 0]), *(copy[3] for copy in copies)], dim=1)

    view_BP = view_P.expand_as(source).masked_fill(~valid, -1)
    return PackedViews(source, view_BP, starts_BV[:, view_P], position_ids, widths)


def _view_copy(role_BT: torch.Tensor, view: PartialView):
    """What a view sees differently: source, valid and positions (B,C), and the first copied token (B,)."""
    seen_BT = view.mask_BT.bool() & (role_BT != view.hidden_role)
    after_BT = (role_BT == view.hidden_role).cumsum(-1) > 0
    token_T = torch.arange(role_BT.shape[1], device=role_BT.device)
    # The last token seen before the first hidden slot; rows that hide nothing copy nothing.
    lead_B = torch.where(seen_BT & ~after_BT, token_T, -1).amax(-1)
    copied_BT = seen_BT & (after_BT | (token_T == lead_B.unsqueeze(-1))) & after_BT.any(-1, keepdim=True)
    index_BC, valid_BC = compact(copied_BT)
    return index_BC, valid_BC, take(positions(seen_BT), index_BC), lead_B.clamp_min(0)


def answer_tokens(labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places and ids of the tokens to be predicted, row by row: (B,L) each, the ids -100 beyond a row's last."""
    scored_BT = labels_BT != -100
    scored_BT[:, 0] = False  # no token precedes it
    index_BL, valid_BL = compact(scored_BT)
    if not index_BL.shape[1]:  # no answer in the batch: one place that does not count
        return labels_BT.new_ones(len(labels_BT), 1), labels_BT.new_full((len(labels_BT), 1), -100)
    return index_BL, take(labels_BT, index_BL).masked_fill(~valid_BL, -100)
