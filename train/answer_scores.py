"""How likely the answers are under each view of the image tokens, from one pass over a batch (Eq. 9).

Shapes by suffix: B rows, T prompt tokens, L answer tokens of the row with the most.
"""

import functools
import types
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput
from trl.trainer.utils import FusedCausalLMOutput

from modeling_granulon.image_tokens import SEMANTIC
from modeling_granulon.joint_views import answer_tokens


@dataclass
class AnswerScores(ModelOutput):
    """
    The answers' scores under each view; (B,L) tensors are zero where nothing is scored.

    full: TRL's output for the full view.
    log_probs, correct: by view, log-probability of each answer token, and whether it is the most likely one.
    granularity_logits (B,G), granularity_index (B,), semantic_mask (I,K): see `GranulonVisualOutput`; None without
        images or levels.
    """

    full: FusedCausalLMOutput | None = None
    log_probs: dict[str, torch.Tensor] | None = None
    correct: dict[str, torch.Tensor] | None = None
    granularity_logits: torch.Tensor | None = None
    granularity_index: torch.Tensor | None = None
    semantic_mask: torch.Tensor | None = None

    @property
    def tokens_B(self) -> torch.Tensor:
        """Answer tokens of each row."""
        return self.full.label_mask.sum(-1)

    def levels(self, names: list[str]) -> list[str]:
        """The views that are levels, of a model whose levels have these names."""
        return [view for view in self.log_probs if view in names]


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
        granularity: the level that each row is read at, None for the controller's choice.
    """
    level_names = model.config.granularity_names
    visual = None
    if pixel_values is not None:
        visual = model.model.encode(
            pixel_values,
            inputs["input_ids"],
            question_input_ids=question_input_ids,
            question_attention_mask=question_attention_mask,
            granularity=granularity,
            every_level=any(view in level_names for view in views),
        )
    index_BL, target_BL = answer_tokens(labels)
    score = functools.partial(fused_forward, fused_lm_head=True, predict=index_BL, **inputs)
    if packed:
        scores = score(visual=visual, joint_views=views[1:], shift_labels=target_BL.repeat(1, len(views)))
        outputs = [
            FusedCausalLMOutput(**{name: x.chunk(len(views), 1)[i] for name, x in scores.items() if x.dim() == 2})
            for i in range(len(views))
        ]
    else:
        outputs = [score(visual=visual, shift_labels=target_BL)]
        for view in views[1:]:
            is_level = view in level_names
            seen = visual.at_level(level_names.index(view)) if is_level and visual is not None else visual
            view = SEMANTIC if is_level else view
            outputs.append(score(visual=seen, visual_view=None if seen is None else view, shift_labels=target_BL))
    chosen = ("granularity_logits", "granularity_index", "semantic_mask")
    return AnswerScores(
        full=outputs[0],
        log_probs={view: output.log_probs for view, output in zip(views, outputs, strict=True)},
        correct={view: output.is_top1 for view, output in zip(views, outputs, strict=True)},
        **({} if visual is None else {name: getattr(visual, name) for name in chosen}),
    )
