"""Supervised fine-tuning with the joint objective: task, pixel, semantic and granularity losses at once (Eq. 9, 10).

TRL's `SFTTrainer` asks the model for the log-likelihood of the answers. Here the model is handed to it behind a
stand-in that runs all views at once and gives it the full one; what the other views say is added to its loss. Every
part is a sum over answer tokens divided by one count, the answer tokens of the whole step, so that neither gradient
accumulation nor the number of devices nor the lengths of answers change what is learned.

Shapes by suffix: B rows, T prompt tokens, L answer tokens of the row with the most, V views, G levels.
"""

import time
from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import ProgressCallback
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from modeling_granulon.joint_views import FULL, PIXEL, SEMANTIC, compact, take

from .arguments import GranulonSFTConfig
from .checkpoints import complete_checkpoint
from .meters import Meter, peak_memory_gb

PART_OF_VIEW = {FULL: "task", PIXEL: "pixel", SEMANTIC: "semantic"}
SHOWN = ("loss_task", "loss_pixel", "loss_semantic", "token_accuracy_full", "tokens_per_second")  # in the progress bar


class GranulonTrainer(SFTTrainer):
    """
    `SFTTrainer` that adds the pixel-only, the semantic-only and the granularity loss, and logs each part.

    Takes what `SFTTrainer` takes; `args` is a `GranulonSFTConfig`, `processing_class` a `GranulonProcessor`. Rows are
    prompts and completions with `images`, or `messages` with `assistant_only_loss`, and may name their level in a
    column `granularity`.

    Raises:
        ValueError: partial views asked of a model without semantic tokens; in a batch, a row that is too long or names
            a level that the model does not have.
        FloatingPointError: a loss or gradient that is not finite, before the weights change.
    """

    def __init__(self, model, args: GranulonSFTConfig, processing_class, data_collator=None, **kwargs):
        config = model.config
        weights = {PIXEL: args.pixel_loss_weight, SEMANTIC: args.semantic_loss_weight}
        self.view_weights = {FULL: 1.0, **{view: weight for view, weight in weights.items() if weight > 0}}
        if len(self.view_weights) > 1 and not config.granularities:
            raise ValueError(
                "the model has no semantic tokens (granularities is empty), so it has one view; set pixel_loss_weight "
                "and semantic_loss_weight to 0"
            )
        self.level_names = config.granularity_names
        if args.granularity_loss_weight > 0 and (config.controller != "learned" or len(config.granularities) < 2):
            raise ValueError("the model has no controller that learns; set granularity_loss_weight to 0")
        if data_collator is None:
            data_collator = GranulonCollator(
                processing_class,
                longest=args.max_length,
                completion_only_loss=not args.assistant_only_loss,
                assistant_only_loss=args.assistant_only_loss,
                levels=self.level_names,
            )
        super().__init__(
            model=model, args=args, processing_class=processing_class, data_collator=data_collator, **kwargs
        )
        self.granulon = granulon_of(self.model)
        self.granulon.register_forward_hook(self._keep_visual_output)
        self.packs_views = config.text_config._attn_implementation in ("sdpa", "eager")
        self.meters = {mode: Meter(meter_names(self.level_names), self.args.device) for mode in ("train", "eval")}
        self.timed_until = time.perf_counter()
        if any(type(callback) is ProgressCallback for callback in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(PartsInProgressBar)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The joint objective of a batch; TRL computes the task's part and its own metrics."""
        level_B = inputs.pop("granularity_labels", None)
        views = AnswerViews(model, tuple(self.view_weights), self)
        super().compute_loss(views, dict(inputs), num_items_in_batch=num_items_in_batch)
        tokens_B = views.scored_BL.sum(-1)
        parts_B = {PART_OF_VIEW[view]: -log_probs_BL.sum(-1) for view, log_probs_BL in views.log_probs.items()}
        weights = {PART_OF_VIEW[view]: weight for view, weight in self.view_weights.items()}
        if self.args.granularity_loss_weight > 0:
            weights["granularity"] = self.args.granularity_loss_weight
            if level_B is not None:  # a row without images has nothing to choose a level for, alone or among others
                sees_B = (inputs["input_ids"] == self.granulon.config.image_token_id).any(-1)
                level_B = level_B.masked_fill(~sees_B, -100)
            parts_B["granularity"] = granularity_loss(views.visual.granularity_logits, level_B, tokens_B)
        sums = {name: part_B.sum() for name, part_B in parts_B.items()}
        self._stop_unless_finite(sums, "loss")
        self._measure(inputs, views, sums, tokens_B)
        self.visual = None

        loss = sum(weight * sums[name] for name, weight in weights.items())
        if num_items_in_batch is None:
            return loss / tokens_B.sum().clamp_min(1)
        # The count is that of all processes, and their gradients are averaged.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss * processes / torch.as_tensor(num_items_in_batch, device=loss.device).clamp_min(1)

    def training_step(self, *args, **kwargs):
        """As upstream; the gradients of a complete step are looked at before they change the weights."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self.accelerator.scaler is None:  # fp16's scaler skips what overflows
            norms = {part: gradient_norm(group) for part, group in parameter_groups(self.model, self.granulon).items()}
            self._stop_unless_finite({part: norm for part, norm in norms.items() if norm is not None}, "gradient")
        self._count_seconds("train")
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        self._count_seconds(mode)
        means = self.meters[mode].read(self.accelerator)
        if means["tokens_per_second"] > 0:  # a summary at the end has measured nothing
            means["peak_memory_gb"] = peak_memory_gb(self.args.device)
            logs.update({f"eval_{name}" if mode == "eval" else name: value for name, value in means.items()})
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial):
        with complete_checkpoint(self, trial):
            super()._save_checkpoint(model, trial)

    def _keep_visual_output(self, module, args, output):
        """TRL's fused head drops what the model chose and saw."""
        self.visual = output

    def _count_seconds(self, mode: str):
        """What passed since the last call belongs to `mode`, so that evaluation takes no time from training."""
        seconds, self.timed_until = time.perf_counter() - self.timed_until, time.perf_counter()
        self.meters[mode].add("tokens_per_second", 0, seconds / self.accelerator.num_processes)

    def _stop_unless_finite(self, values: dict[str, torch.Tensor], what: str):
        finite = torch.stack([value.detach().float() for value in values.values()]).isfinite() if values else None
        if finite is None or finite.all():
            return
        parts = ", ".join(name for name, good in zip(values, finite.tolist(), strict=True) if not good)
        raise FloatingPointError(
            f"step {self.state.global_step + 1}: the {what} of {parts} is not finite; the weights were not changed. "
            "Look at the data of this step, lower the learning rate, or train in bfloat16 instead of float16"
        )

    @torch.no_grad()
    def _measure(self, inputs: dict, views: "AnswerViews", sums: dict[str, torch.Tensor], tokens_B: torch.Tensor):
        meter, visual = self.meters["train" if self.model.training else "eval"], views.visual
        count = tokens_B.sum()
        for name, part in sums.items():
            meter.add(f"loss_{name}", part, count)
        for view, right_BL in views.right.items():
            meter.add(f"token_accuracy_{view}", right_BL.sum(), count)
        slots_BT = inputs["input_ids"] == self.granulon.config.image_token_id
        empty = 0 if visual.semantic_mask is None else (~visual.semantic_mask).sum().to(slots_BT.device)
        read = inputs["attention_mask"].sum() - empty
        meter.add("visual_token_share", slots_BT.sum() - empty, read)
        meter.add("tokens_per_second", read, 0)
        if visual.granularity_index is None:
            return
        seeing_B = slots_BT.any(-1)
        if visual.granularity_logits is not None:
            entropy_B = torch.distributions.Categorical(logits=visual.granularity_logits.float()).entropy()
            meter.add("controller_entropy", (entropy_B * seeing_B).sum(), seeing_B.sum())
        for level, name in enumerate(self.level_names):
            chosen_B = seeing_B & (visual.granularity_index == level)
            meter.add(f"level_share/{name}", chosen_B.sum(), seeing_B.sum())
            level_tokens = (tokens_B * chosen_B).sum()
            meter.add(f"loss/{name}", -(views.log_probs[FULL].sum(-1) * chosen_B).sum(), level_tokens)
            meter.add(f"token_accuracy/{name}", (views.right[FULL].sum(-1) * chosen_B).sum(), level_tokens)


class AnswerViews:
    """Stands in for the model in TRL's loss: reads the answers in all views and gives back the full one.

    After the call: scored_BL bool, and for each view log_probs and right (B,L), zero where nothing is scored; visual,
    what the model chose and saw.
    """

    def __init__(self, model, views: tuple[str, ...], trainer: GranulonTrainer):
        self.model, self.views, self.trainer = model, views, trainer

    def __call__(self, labels: torch.Tensor, **inputs):
        index_BL, target_BL = answer_tokens(labels)
        self.scored_BL = target_BL != -100
        read = self._in_one_pass if self.trainer.packs_views else self._one_by_one
        outputs = read(index_BL, target_BL, inputs)
        self.log_probs = {view: output.log_probs for view, output in zip(self.views, outputs, strict=True)}
        self.right = {view: output.is_top1 for view, output in zip(self.views, outputs, strict=True)}
        return outputs[0]

    def _in_one_pass(self, index_BL, target_BL, inputs) -> list:
        count = len(self.views)
        packed = self.model(
            **inputs, joint_views=self.views[1:], predict=index_BL, shift_labels=target_BL.repeat(1, count)
        )
        self.visual = self.trainer.visual
        return [
            type(packed)(**{name: x.chunk(count, dim=1)[view] if x.dim() == 2 else x for name, x in packed.items()})
            for view in range(count)
        ]

    def _one_by_one(self, index_BL, target_BL, inputs) -> list:
        """For attention that takes no block mask; the level is chosen once."""
        outputs, chosen = [self.model(**inputs, predict=index_BL, shift_labels=target_BL)], {}
        self.visual = self.trainer.visual
        if self.visual.granularity_index is not None:
            chosen["granularity"] = self.visual.granularity_index
        for view in self.views[1:]:
            outputs.append(self.model(**inputs, **chosen, visual_view=view, predict=index_BL, shift_labels=target_BL))
        return outputs


@dataclass
class GranulonCollator(DataCollatorForVisionLanguageModeling):
    """TRL's collator, with `granularity_labels` (B,) long, -100 where a row names no level; it cuts nothing.

    levels: names of the model's levels; without any, the rows' levels are left aside.
    longest: the most tokens that a row may have.
    """

    levels: list[str] = field(default_factory=list)
    longest: int | None = None

    def torch_call(self, examples: list[dict]) -> dict:
        examples = [dict(example) for example in examples]  # upstream changes them
        named = [example.pop("granularity", None) for example in examples]
        batch = super().torch_call(examples)
        for row, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
            if self.longest is not None and length > self.longest:
                raise ValueError(
                    f"row {row} of a batch has {length} tokens and max_length is {self.longest}; rows are never cut: "
                    "raise max_length, or leave the row out (load_rows with max_length does)"
                )
        batch["granularity_labels"] = torch.tensor([self._level(row, name) for row, name in enumerate(named)])
        return batch

    def _level(self, row: int, name: str | None) -> int:
        if name is None or not self.levels:
            return -100
        if name not in self.levels:
            raise ValueError(f"row {row} of a batch names the level {name!r}; the model has {self.levels}")
        return self.levels.index(name)


class PartsInProgressBar(ProgressCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.set_postfix({name: f"{logs[name]:.3g}" for name in SHOWN if name in logs})


def answer_tokens(labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places and ids of the tokens to be predicted, row by row: (B,L) each, the ids -100 beyond a row's last."""
    scored_BT = labels_BT != -100
    scored_BT[:, 0] = False  # nothing stands before it
    index_BL, valid_BL = compact(scored_BT)
    if not index_BL.shape[1]:  # no answer in the batch: one place that does not count
        return labels_BT.new_ones(len(labels_BT), 1), labels_BT.new_full((len(labels_BT), 1), -100)
    return index_BL, take(labels_BT, index_BL).masked_fill(~valid_BL, -100)


def granularity_loss(logits_BG: torch.Tensor | None, level_B: torch.Tensor | None, tokens_B: torch.Tensor):
    """Cross-entropy of the named levels, (B,), times the row's answer tokens: it shares their count."""
    if logits_BG is None or level_B is None:
        return tokens_B.float() * 0
    return F.cross_entropy(logits_BG.float(), level_B, reduction="none") * tokens_B


def granulon_of(model):
    """The `GranulonModel` within a head, with or without adapters."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model


def parameter_groups(model, granulon) -> dict[str, list]:
    """The parameters that train, by the part of the model they belong to."""
    groups, taken = {}, set()
    parts = {"projector": granulon.multi_modal_projector, "controller": granulon.granularity_controller}
    for part, module in (*parts.items(), ("language model", model)):
        owned = [] if module is None else module.parameters()
        groups[part] = [parameter for parameter in owned if parameter.requires_grad and id(parameter) not in taken]
        taken |= {id(parameter) for parameter in groups[part]}
    return groups


def gradient_norm(parameters: list) -> torch.Tensor | None:
    """Of the gradients that are there; None without any."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return None
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def meter_names(levels: list[str]) -> list[str]:
    by_level = [f"{name}/{level}" for name in ("level_share", "loss", "token_accuracy") for level in levels]
    losses = [f"loss_{part}" for part in (*PART_OF_VIEW.values(), "granularity")]
    accuracies = [f"token_accuracy_{view}" for view in PART_OF_VIEW]
    return [*losses, *accuracies, "controller_entropy", "visual_token_share", "tokens_per_second", *by_level]
