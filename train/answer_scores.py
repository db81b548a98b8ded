"""How likely the answers are under each view of the image tokens, from one pass over a batch (Eq. 9).

A conversation asks several questions, and the controller chooses a level for each. Answers of a row that are read at
the same level share one pass over it, since an answer depends on what stands before it alone: a row is read once per
level that its questions choose, and its images pass the tower once. Every answer is scored as if its row ended there.

Shapes by suffix: B rows, A answers of all rows, R rows as they are read, T prompt tokens, L answer tokens of the row
with the most, G levels.
"""

import functools
import types
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.utils import ModelOutput
from trl.trainer.utils import FusedCausalLMOutput

from modeling_granulon.image_tokens import SEMANTIC, take
from modeling_granulon.joint_views import answer_tokens


@dataclass
class AnswerScores(ModelOutput):
    """
    The answers' scores under each view; (R,L) tensors are zero where nothing is scored.

    full: TRL's output for the full view.
    log_probs, correct: by view, log-probability of each answer token, and whether it is the most likely one.
    answer_RL: long, the answer that each token belongs to.
    sees_A: bool, whether the answer's prompt has an image.
    granularity_logits (A,G), granularity_index (A,): the controller's choices; None without images or levels.
    text_tokens, visual_tokens: how many of each the language model reads in the full view.
    slots, used_slots: places of the sequence that holds all views, and those that are not padding.
    patches: of all images that pass the tower.
    """

    full: FusedCausalLMOutput | None = None
    log_probs: dict[str, torch.Tensor] | None = None
    correct: dict[str, torch.Tensor] | None = None
    answer_RL: torch.Tensor | None = None
    sees_A: torch.Tensor | None = None
    granularity_logits: torch.Tensor | None = None
    granularity_index: torch.Tensor | None = None
    text_tokens: torch.Tensor | None = None
    visual_tokens: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    used_slots: torch.Tensor | None = None
    patches: int | None = None

    def by_answer(self, values_RL: torch.Tensor) -> torch.Tensor:
        """Sums over the tokens of each answer, (A,) fp32."""
        sums_A = values_RL.new_zeros(len(self.sees_A), dtype=torch.float32)
        return sums_A.index_add(0, self.answer_RL.flatten(), values_RL.float().flatten())

    @property
    def tokens_A(self) -> torch.Tensor:
        """How many tokens each answer has."""
        return self.by_answer(self.full.label_mask)

    def levels(self, names: list[str]) -> list[str]:
        """The views that are levels, of a model whose levels have these names."""
        return [view for view in self.log_probs if view in names]


class Answers(NamedTuple):
    """Where the answers of a batch stand.

    token_BT: long, the answer that each learned token belongs to; -1 on other tokens.
    row_A: long, the row of each answer.
    """

    token_BT: torch.Tensor
    row_A: torch.Tensor

    @classmethod
    def of(cls, labels: torch.Tensor, answer_ids: torch.Tensor | None = None) -> "Answers":
        """Of a batch of `GranulonCollator`; without its answer_ids every row is one answer."""
        row_B = torch.arange(len(labels), device=labels.device)
        if answer_ids is None:
            return cls(torch.where(labels != -100, row_B.unsqueeze(-1), -1), row_B)
        count_B = answer_ids.amax(-1) + 1  # answers up to and with this row
        row_A = torch.searchsorted(count_B, torch.arange(int(count_B[-1]), device=labels.device), right=True)
        return cls(answer_ids, row_A)

    def see(self, placeholder_BT: torch.Tensor) -> torch.Tensor:
        """Which answers have an image before them, (A,) bool."""
        sees_BT = (placeholder_BT.cumsum(-1) > 0) & (self.token_BT >= 0)
        sees_A = torch.zeros(len(self.row_A), dtype=torch.long, device=placeholder_BT.device)
        return sees_A.index_add(0, self.token_BT.clamp_min(0).flatten(), sees_BT.flatten().long()) > 0

    def by_level(self, level_A: torch.Tensor, levels: int):
        """The rows as they are read, once per level of their answers: rows (R,), levels (R,), and (A,) which of them
        reads each answer."""
        keys_R, read_A = torch.unique(self.row_A * levels + level_A, return_inverse=True)
        return keys_R // levels, keys_R % levels, read_A


def add_answer_scores(model):
    """
    Extend a model that has TRL's fused head: `model(..., labels=labels, views=views)` returns `AnswerScores`.

    Like TRL's `add_fused_lm_head` this replaces the instance's `forward`, so that DDP, FSDP and autocast see one call.
    """
    fused_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, views: tuple[str, ...] | None = None, packed: bool = True, **inputs):
        if views is None:
            return fused_forward(*args, **inputs)
        return score_views(self, fused_forward, views, packed, **inputs)

    model.forward = types.MethodType(forward, model)


def score_views(
    model,
    fused_forward,
    views: tuple[str, ...],
    packed: bool,
    labels: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    answer_ids: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    question_input_ids: torch.Tensor | None = None,
    question_attention_mask: torch.Tensor | None = None,
    granularity: list[int | None] | None = None,
    **inputs,
) -> AnswerScores:
    """
    Encode the images once and score the answers under every view.

    Args:
        fused_forward: the model's forward with TRL's fused head.
        views: the full view first, then "pixel", "semantic" or names of levels.
        packed: all views in one packed sequence; False runs one pass each, for attention that takes no block mask.
        labels: (B,T) long, -100 where nothing is learned.
        answer_ids: (B,T) long, see `Answers`.
        question_input_ids, question_attention_mask: (A,Tq), the question of each answer.
        granularity: the level that each answer is read at, None for the controller's choice.
    """
    base, config, level_names = model.model, model.config, model.config.granularity_names
    answers, placeholder_BT = Answers.of(labels, answer_ids), input_ids == config.image_token_id
    sees_A, answer_BT = answers.see(placeholder_BT), answers.token_BT
    visual = logits_AG = level_A = None
    if pixel_values is not None:
        level_R = image_J = None
        if level_names:
            question = question_input_ids, question_attention_mask, granularity
            logits_AG, level_A, _ = base.choose_levels(len(sees_A), *question, labels.device)
            row_R, level_R, read_A = answers.by_level(level_A * sees_A, len(level_names))  # no image, no level
            image_J = _images_of(row_R, base.layout(placeholder_BT, pixel_values).images_per_row)
            input_ids, attention_mask, labels, answer_BT = (
                x[row_R] for x in (input_ids, attention_mask, labels, answer_BT)
            )
            read_RT = torch.where(answer_BT >= 0, read_A[answer_BT], -1)
            labels = labels.masked_fill(read_RT != torch.arange(len(row_R), device=labels.device).unsqueeze(-1), -100)
        every_level = any(view in level_names for view in views)
        visual = base.encode(
            pixel_values, input_ids, granularity=level_R, every_level=every_level, image_index=image_J
        )
        visual.granularity_logits = logits_AG  # the forward adds a zero that depends on them, for DDP
    index_RL, target_RL = answer_tokens(labels)
    score = functools.partial(
        fused_forward, input_ids, attention_mask=attention_mask, fused_lm_head=True, predict=index_RL, **inputs
    )
    with _packing_of(base) as packing:
        outputs = _score_each(score, model, visual, views, target_RL, packed)
    placeholder_RT = input_ids == config.image_token_id
    visual_R = _visual_tokens(visual, placeholder_RT)
    text_R = attention_mask.sum(-1) - placeholder_RT.sum(-1)
    read_R = text_R + visual_R
    return AnswerScores(
        full=outputs[0],
        log_probs={view: output.log_probs for view, output in zip(views, outputs, strict=True)},
        correct={view: output.is_top1 for view, output in zip(views, outputs, strict=True)},
        answer_RL=take(answer_BT, index_RL).clamp_min(0),
        sees_A=sees_A,
        granularity_logits=logits_AG,
        granularity_index=level_A,
        text_tokens=text_R.sum(),
        visual_tokens=visual_R.sum(),
        slots=read_R.amax() * len(read_R) if packing[0] is None else read_R.new_tensor(packing[0].view_BP.numel()),
        used_slots=read_R.sum() if packing[0] is None else (packing[0].view_BP >= 0).sum(),
        patches=0
        if visual is None
        else len(pixel_values) * (visual.image_hidden_states.shape[1] - config.max_semantic_tokens),
    )


def _score_each(score, model, visual, views: tuple[str, ...], target_RL: torch.Tensor, packed: bool):
    """TRL's output for each view, from one pass over all of them or from one pass each."""
    level_names = model.config.granularity_names
    if packed:
        scores = score(visual=visual, joint_views=views[1:], shift_labels=target_RL.repeat(1, len(views)))
        parts = {name: x.chunk(len(views), 1) for name, x in scores.items() if x.dim() == 2}
        return [FusedCausalLMOutput(**{name: part[i] for name, part in parts.items()}) for i in range(len(views))]
    outputs = [score(visual=visual, shift_labels=target_RL)]
    for view in views[1:]:
        is_level = view in level_names
        seen = visual.at_level(level_names.index(view)) if is_level and visual is not None else visual
        view = SEMANTIC if is_level else view
        outputs.append(score(visual=seen, visual_view=None if seen is None else view, shift_labels=target_RL))
    return outputs


def _images_of(row_R: torch.Tensor, images_per_row: list[int]) -> torch.Tensor:
    """Numbers of the images of the named rows, in order, (J,) long."""
    first = [sum(images_per_row[:row]) for row in range(len(images_per_row))]
    rows = row_R.tolist()
    return torch.tensor([first[row] + place for row in rows for place in range(images_per_row[row])], dtype=torch.long)


def _visual_tokens(visual, placeholder_RT: torch.Tensor) -> torch.Tensor:
    """Image tokens that are read of each row, (R,) long: the placeholders without unused semantic slots."""
    placed_R = placeholder_RT.sum(-1)
    if visual is None or visual.semantic_mask is None:
        return placed_R
    pixel = visual.image_hidden_states.shape[1] - visual.semantic_mask.shape[1]
    row_J = torch.arange(len(placed_R)).repeat_interleave(visual.images_per_row).to(placed_R.device)
    unused_R = torch.zeros_like(placed_R).index_add(0, row_J, (~visual.semantic_mask).sum(-1))
    has_semantic = placed_R.sum() != pixel * len(row_J)
    return placed_R - unused_R * has_semantic


@contextmanager
def _packing_of(base):
    """A list that receives the `PackedViews` of the passes within the block, None for one that packs nothing."""
    seen = []
    hook = base.register_forward_hook(lambda module, args, output: seen.append(output.packed_views))
    try:
        yield seen
    finally:
        hook.remove()
