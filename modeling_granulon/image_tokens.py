"""Where image tokens stand in a prompt, and which of them a view shows (Eq. 8).

An image takes a span of placeholders: N pixel slots, then K semantic slots (the "full" view), or one of the two groups
alone. A slot's role follows from its rank in the span, so one placeholder id serves both. Needs torch alone.

Shapes: B rows, T prompt tokens, R image slots of the longest row, I images, N pixel slots, K semantic slots,
L kept tokens of the longest row.
"""

from typing import NamedTuple

import torch

FULL, PIXEL, SEMANTIC = VIEWS = "full", "pixel", "semantic"
VISUAL_VIEWS = (*VIEWS, "auto")  # what a user may ask for; auto is the view of the row's level
TEXT_ROLE, PIXEL_ROLE, SEMANTIC_ROLE = 0, 1, 2
HIDDEN_ROLE = {FULL: -1, PIXEL: SEMANTIC_ROLE, SEMANTIC: PIXEL_ROLE}


class SlotLayout(NamedTuple):
    """The image slots of each row, in the order of the prompt, on the CPU.

    index_BR: long, place of the slot in the flattened (I * (N + K)) image tokens; 0 beyond the row's last slot.
    role_BR: long, PIXEL_ROLE or SEMANTIC_ROLE; TEXT_ROLE beyond the row's last slot.
    images_per_row: number of images of each row.
    """

    index_BR: torch.Tensor
    role_BR: torch.Tensor
    images_per_row: list[int]

    @property
    def is_full(self) -> bool:
        """Whether the prompts have pixel and semantic slots, so that a view can hide one kind."""
        return bool((self.role_BR == PIXEL_ROLE).any() and (self.role_BR == SEMANTIC_ROLE).any())


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
        view: the requested view, which decides what a span is where N = K.

    Raises:
        ValueError: naming the first row whose placeholders are not whole spans, or the total that does not fit.
    """
    placeholder_BT = placeholder_BT.cpu()  # read once: everything below is computed on the host
    counts = placeholder_BT.sum(-1).tolist()
    lengths = view_lengths(num_pixel, num_semantic)
    misfit = {name: abs(length * num_images - sum(counts)) for name, length in lengths.items()}
    span_view = view if misfit.get(view) == 0 else min(misfit, key=misfit.get)
    span = lengths[span_view]
    _check_spans(placeholder_BT, counts, num_images, span, f"{span} ({span_view} view)")
    images_per_row = [count // span for count in counts]

    rank_R = torch.arange(max(counts))
    images_B1 = torch.tensor(images_per_row).unsqueeze(-1)
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
        raise ValueError(f"row {row} has an interrupted image span; every image needs {needed} in a row{remedy}")


def check_images_present(placeholder_BT: torch.Tensor):
    """Raises ValueError for prompts with image tokens but no images."""
    for row, count in enumerate(placeholder_BT.sum(-1).tolist()):
        if count:
            raise ValueError(f"row {row} has {count} image tokens but no pixel_values were passed; pass its images")


def slot_roles(placeholder_BT: torch.Tensor, role_BR: torch.Tensor) -> torch.Tensor:
    """Role of every prompt token: TEXT_ROLE, PIXEL_ROLE or SEMANTIC_ROLE, (B,T)."""
    return gather_slots(placeholder_BT, role_BR) * placeholder_BT


def gather_slots(placeholder_BT: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values of the row-aligned slots, (B,R) or (B,R,E), at their placeholders, (B,T) or (B,T,E)."""
    return take(values, (placeholder_BT.long().cumsum(-1) - 1).clamp(0, values.shape[1] - 1))


def insert_slots(embeds_BTE: torch.Tensor, placeholder_BT: torch.Tensor, image_BRE: torch.Tensor) -> torch.Tensor:
    """The prompt's embeddings with the image tokens in place of the placeholders."""
    image_BRE = image_BRE.to(embeds_BTE.device, embeds_BTE.dtype)
    return torch.where(placeholder_BT.unsqueeze(-1), gather_slots(placeholder_BT, image_BRE), embeds_BTE)


def visible_roles(role: torch.Tensor, views: list[str]) -> torch.Tensor:
    """Which slots each row's view shows: (B,...) roles and one view per row give a mask of the same shape."""
    hidden_B = torch.tensor([HIDDEN_ROLE[view] for view in views], device=role.device)
    return role != hidden_B.view(-1, *[1] * (role.dim() - 1))


def positions(mask_BT: torch.Tensor) -> torch.Tensor:
    """Position ids that skip masked places, so that neither padding nor an empty slot moves a token: (B,T) long."""
    return (mask_BT.long().cumsum(-1) - 1).clamp_min(0)


def hide_slots(
    attention_mask: torch.Tensor | None, placeholder_BT: torch.Tensor, visible_BR: torch.Tensor
) -> torch.Tensor:
    """The attention mask with holes where an image slot is empty or hidden by the view.

    A (B, past + T) mask keeps its past; a 4-D mask is returned unchanged.
    """
    hidden_BT = placeholder_BT & ~gather_slots(placeholder_BT, visible_BR.to(placeholder_BT.device))
    if attention_mask is None:
        return (~hidden_BT).long()
    if attention_mask.dim() != 2:
        return attention_mask
    past = attention_mask.shape[1] - hidden_BT.shape[1]
    return attention_mask.masked_fill(torch.nn.functional.pad(hidden_BT, (past, 0)), 0)


def compact(keep_BT: torch.Tensor, pad_left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the kept tokens of each row together, in their order; L is the longest row.

    Returns:
        index (B,L) of the token that moves to each place, and valid (B,L) bool, False on padding.
    """
    length = int(keep_BT.sum(-1).max())
    if pad_left:
        index_BL = keep_BT.long().argsort(dim=-1, stable=True)[:, keep_BT.shape[1] - length :]
    else:
        index_BL = (~keep_BT).long().argsort(dim=-1, stable=True)[:, :length]
    return index_BL, keep_BT.gather(1, index_BL)


def take(values: torch.Tensor, index_BL: torch.Tensor) -> torch.Tensor:
    """Values (B,T) or (B,T,E) at the given places, (B,L) or (B,L,E)."""
    return values.gather(1, index_BL if values.dim() == 2 else index_BL.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def without_hidden(
    embeds_BTE: torch.Tensor, position_ids_BT: torch.Tensor, mask_BT: torch.Tensor, predict_BL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings, positions and mask of the tokens that are seen alone, and the new places of predicted tokens."""
    index_BS, valid_BS = compact(mask_BT.bool())
    place_BS = torch.arange(index_BS.shape[1], device=index_BS.device).expand_as(index_BS)
    place_BT = torch.zeros_like(position_ids_BT).scatter(1, index_BS, place_BS)
    return take(embeds_BTE, index_BS), take(position_ids_BT, index_BS), valid_BS, place_BT.gather(1, predict_BL)


class PlacedImages(NamedTuple):
    """Image tokens in the order of each row's placeholders.

    visible_BR is False on slots that are empty or hidden by the view; None where the attention mask says so already.
    """

    embeds_BRE: torch.Tensor | None
    visible_BR: torch.Tensor | None = None


class Prompt(NamedTuple):
    """Prompts before their images: placeholders (B,T), embeddings (B,T,E) and the caller's attention mask."""

    placeholder_BT: torch.Tensor
    text_BTE: torch.Tensor
    attention_mask: torch.Tensor | None

    def insert(self, placed: PlacedImages) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings with the images in their places, and the mask that hides what is not to be seen."""
        embeds, mask = self.text_BTE, self.attention_mask
        if placed.embeds_BRE is not None:
            embeds = insert_slots(embeds, self.placeholder_BT, placed.embeds_BRE)
        if placed.visible_BR is not None:
            mask = hide_slots(mask, self.placeholder_BT, placed.visible_BR)
        return embeds, mask
