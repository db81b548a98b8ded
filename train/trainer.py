"""Supervised fine-tuning with the joint objective: task, pixel, semantic and controller losses at once (Eq. 9-11).

`SFTTrainer` with a loss of its own: the answers are scored under every view in one pass (answer_scores.py) and the
losses of the views are added. Every likelihood is a sum over answer tokens divided by the answer tokens of the whole
step, and every part of the controller's loss a sum over rows divided by their number in the step, so that neither
gradient accumulation nor the number of devices changes what is learned.

Shapes by suffix: B rows, T prompt tokens, L answer tokens of the row with the most, G levels, S levels of this step.
"""

import time
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from granulon.train.controller.replay import QuestionReplay
from modeling_granulon.image_tokens import FULL, PIXEL, SEMANTIC

from .answer_scores import AnswerScores, add_answer_scores
from .arguments import GranulonSFTConfig
from .checkpoints import finish_checkpoint, remove_checkpoint
from .meters import Meter, peak_memory_gb
from .sampling import GroupedByLength
from .sharding import KeepQuestionLayersWhole, gradient_norms, set_up_sharding, whole_weights
from .vision_cache import VisionCache

LIKELIHOODS = ("task", "pixel", "semantic")  # parts of the loss that count answer tokens
CONTROLLER_PARTS = ("controller", "labels", "replay")  # parts that count rows
SHOWN = ("loss_task", "loss_pixel", "loss_semantic", "token_accuracy_full", "tokens_per_second")  # in the progress bar


class GranulonTrainer(SFTTrainer):
    """
    `SFTTrainer` that adds the pixel-only, the semantic-only and the controller's loss, and logs each part.

    Takes what `SFTTrainer` takes; `args` is a `GranulonSFTConfig`, `processing_class` a `GranulonProcessor`. Rows are
    prompts and completions with `images`, or `messages` with `assistant_only_loss`, and may name their level in a
    column `granularity`.

    Args:
        replay: questions with known levels that the controller goes on learning beside the rows.

    Raises:
        ValueError: partial views asked of a model without semantic tokens; in a batch, a row that is too long or names
            a level that the model does not have.
        FloatingPointError: a loss or gradient that is not finite, before the weights change.
    """

    def __init__(
        self,
        model,
        args: GranulonSFTConfig,
        processing_class,
        data_collator=None,
        replay: QuestionReplay | None = None,
        **kwargs,
    ):
        config = model.config
        if max(args.pixel_loss_weight, args.semantic_loss_weight) > 0 and not config.granularities:
            raise ValueError(
                "the model has no semantic tokens (granularities is empty), so it has one view; set pixel_loss_weight "
                "and semantic_loss_weight to 0"
            )
        self.level_names = config.granularity_names
        self.learns_levels = config.controller == "learned" and len(self.level_names) > 1
        if not self.learns_levels and (args.granularity_loss_weight > 0 or replay is not None):
            raise ValueError("the model has no controller that learns; set granularity_loss_weight to 0")
        if data_collator is None:
            data_collator = GranulonCollator(
                processing_class,
                longest=args.max_length,
                completion_only_loss=not args.assistant_only_loss,
                assistant_only_loss=args.assistant_only_loss,
                levels=self.level_names,
                visual_view=args.visual_view,
            )
        args = copy(args)  # older checkpoints are deleted by finish_checkpoint, once the new one is complete
        self.save_total_limit, args.save_total_limit = args.save_total_limit, None
        super().__init__(
            model=model, args=args, processing_class=processing_class, data_collator=data_collator, **kwargs
        )
        add_answer_scores(head_of(self.model))
        self.granulon = head_of(self.model).model
        set_up_sharding(self.accelerator.state, self.granulon)
        self.add_callback(KeepQuestionLayersWhole(self.granulon))
        if self.args.vision_cache:
            VisionCache(self.granulon, self.args.vision_cache, self.args.process_index).attach()
        self.packs_views = config.text_config._attn_implementation in ("sdpa", "eager")
        self.replay, self.rows_of_step = replay, None
        self.meters = {mode: Meter(meter_names(self.level_names), self.args.device) for mode in ("train", "eval")}
        self.timed_until = time.perf_counter()
        if any(type(callback) is ProgressCallback for callback in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(PartsInProgressBar)

    def _get_train_sampler(self, train_dataset=None):
        """As upstream; rows whose length is known are grouped by length, if the arguments ask for it."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        grouped = self.args.train_sampling_strategy == "group_by_length"
        if grouped and "length" in (getattr(rows, "column_names", None) or ()):
            return GroupedByLength(
                rows.with_format("numpy")["length"][:], self._train_batch_size * self.args.world_size, self.args.seed
            )
        return super()._get_train_sampler(train_dataset)

    def get_batch_samples(self, *args, **kwargs):
        """As upstream; also counts the rows of the step over all processes, which divide the controller's losses.

        A run that is resumed at `max_steps` takes no further step.
        """
        if 0 < self.args.max_steps <= self.state.global_step:
            return [], None
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self.learns_levels and batches:
            self.rows_of_step = self.accelerator.reduce(sum(map(self._count_rows, batches)), reduction="sum")
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The joint objective of a batch, and TRL's own metrics of the full view."""
        level_B = inputs.pop("granularity_labels", None)
        named = None
        if self.args.level_from_rows and level_B is not None:
            named = [level if level >= 0 else None for level in level_B.tolist()]
        scores = model(**inputs, views=self._views(), packed=self.packs_views, granularity=named)
        super().compute_loss(lambda **_: scores.full, dict(inputs), num_items_in_batch=num_items_in_batch)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        if num_items_in_batch is None:
            tokens, processes = scores.tokens_B.sum(), 1
        else:  # the count is that of all processes, and their gradients are averaged
            tokens = torch.as_tensor(num_items_in_batch, device=self.args.device)
        nll_BS, logits_BS = self._levels(scores, inputs)
        likelihoods = self._likelihoods(scores, nll_BS, logits_BS)
        controller = self._controller_losses(scores, inputs, level_B, nll_BS, logits_BS)
        self._stop_unless_finite(likelihoods | {name: total for name, (total, *_) in controller.items()}, "loss")
        self._measure(inputs, scores, likelihoods, controller, nll_BS)

        weights = dict(zip(LIKELIHOODS, (1, self.args.pixel_loss_weight, self.args.semantic_loss_weight)))
        loss = sum(weights[name] * total for name, total in likelihoods.items()) / tokens.clamp_min(1)
        for total, rows, _ in controller.values():
            loss = loss + self.args.granularity_loss_weight * total / rows.clamp_min(1)
        return loss * processes

    def _views(self) -> tuple[str, ...]:
        """The views of this step: the full one, the pixel tokens alone, and the semantic tokens of some levels."""
        args = self.args
        if args.visual_view != FULL:
            return (FULL,)
        pixel = (PIXEL,) if args.pixel_loss_weight > 0 else ()
        if not self.learns_levels:
            return (FULL, *pixel, *([SEMANTIC] if args.semantic_loss_weight > 0 else []))
        names = self.level_names if max(args.semantic_loss_weight, args.granularity_loss_weight) > 0 else []
        if args.levels_per_step and len(names) > args.levels_per_step:
            order = torch.Generator().manual_seed(args.seed + self.state.global_step)
            chosen = torch.randperm(len(names), generator=order)[: args.levels_per_step].sort().values
            names = [names[level] for level in chosen.tolist()]
        return (FULL, *pixel, *names)

    def _levels(self, scores: AnswerScores, inputs: dict) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Each level's negative log-likelihood of the answers, and the controller's logits of these levels.

        (B,S) each, or None without levels. A row whose level the controller does not choose has equal logits.
        """
        levels = [level for level, name in enumerate(self.level_names) if name in scores.log_probs]
        if not levels:
            return None, None
        nll_BS = torch.stack([-scores.log_probs[self.level_names[level]].sum(-1) for level in levels], dim=1)
        logits_BG = scores.granularity_logits
        if logits_BG is None:
            return nll_BS, torch.zeros_like(nll_BS)
        return nll_BS, logits_BG[:, levels].float() * self._asked_rows(inputs).unsqueeze(-1)

    def _likelihoods(self, scores: AnswerScores, nll_BS, logits_BS) -> dict[str, torch.Tensor]:
        """The parts of Eq. 9: sums over answer tokens, in nats."""
        parts = {"task": -scores.log_probs[FULL].sum()}
        if PIXEL in scores.log_probs:
            parts["pixel"] = -scores.log_probs[PIXEL].sum()
        if SEMANTIC in scores.log_probs:
            parts["semantic"] = -scores.log_probs[SEMANTIC].sum()
        if nll_BS is not None and self.args.semantic_loss_weight > 0:
            share = self.args.level_exploration
            weights_BS = (1 - share) * logits_BS.detach().softmax(-1) + share / logits_BS.shape[1]  # no level starves
            parts["semantic"] = (weights_BS * nll_BS).sum()
        return parts

    def _controller_losses(self, scores: AnswerScores, inputs: dict, level_B, nll_BS, logits_BS) -> dict[str, tuple]:
        """Eq. 11: the answer's likelihood over all levels, and the cross-entropy of known and of replayed levels.

        Each part is a sum, the number of rows that divides it (of the whole step) and that of this batch.
        """
        if not self.args.granularity_loss_weight:
            return {}
        parts, logits_BG = {}, scores.granularity_logits
        if logits_BG is not None:
            own = self._count_rows(inputs | {"granularity_labels": level_B})
            asked, labelled = own if self.rows_of_step is None or not self.model.training else self.rows_of_step
            asked_B = self._asked_rows(inputs)
            if nll_BS is not None:
                cost_BS = nll_BS.detach() + self.args.token_cost * self._token_shares(scores)
                # Its gradient is p minus the posterior of the levels: none where all levels answer equally well.
                loss_B = -(logits_BS.log_softmax(-1) - cost_BS).logsumexp(-1)
                parts["controller"] = (loss_B * asked_B).sum(), asked, own[0]
            if level_B is not None:
                level_B = level_B.masked_fill(~asked_B, -100)
                parts["labels"] = F.cross_entropy(logits_BG.float(), level_B, reduction="sum"), labelled, own[1]
        if self.replay is not None:
            ids, mask, target_QG = self.replay.sample(self.args.seed + self.state.global_step, self.args.device)
            logits_QG = self.granulon.question_logits(ids, mask)
            steps = self.current_gradient_accumulation_steps if self.model.training else 1
            own = torch.tensor(len(ids), device=ids.device)
            count = own * steps * self.accelerator.num_processes
            parts["replay"] = F.cross_entropy(logits_QG.float(), target_QG, reduction="sum"), count, own
        return parts

    def _token_shares(self, scores: AnswerScores) -> torch.Tensor:
        """Semantic tokens of each scored level over the most of any level, (S,)."""
        keep = {entry["name"]: entry["keep"] for entry in self.granulon.config.granularities}
        shares = [keep[name] / max(keep.values()) for name in scores.levels(self.level_names)]
        return torch.tensor(shares, device=self.args.device)

    def _asked_rows(self, inputs: dict) -> torch.Tensor:
        """Rows with an image and a question, (B,) bool: those whose level the controller chooses."""
        sees_B = (inputs["input_ids"] == self.granulon.config.image_token_id).any(-1)
        mask = inputs.get("question_attention_mask")
        return sees_B & mask.any(-1).to(sees_B.device) if mask is not None else torch.zeros_like(sees_B)

    def _count_rows(self, inputs: dict) -> torch.Tensor:
        """How many rows the controller chooses for, and how many of these name their level, (2,) long."""
        asked_B, level_B = self._asked_rows(inputs), inputs.get("granularity_labels")
        labelled_B = torch.zeros_like(asked_B) if level_B is None else asked_B & (level_B != -100).to(asked_B.device)
        return torch.stack([asked_B.sum(), labelled_B.sum()]).to(self.args.device)

    def training_step(self, *args, **kwargs):
        """As upstream; the gradients of a complete step are looked at before they change the weights."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self.accelerator.mixed_precision != "fp16":  # it skips what overflows
            groups = parameter_groups(self.model, self.granulon)
            self._stop_unless_finite(gradient_norms(groups, self.deepspeed), "gradient")
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As upstream, which saves no model where checkpoints are in shards: the caller gets the whole one."""
        with whole_weights(None if _internal_call else getattr(self.accelerator.state, "fsdp_plugin", None)):
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        remove_checkpoint(self, folder)
        super()._save_checkpoint(model, trial)
        finish_checkpoint(self, folder, self.save_total_limit)

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
    def _measure(self, inputs: dict, scores: AnswerScores, likelihoods: dict, controller: dict, nll_BS):
        meter = self.meters["train" if self.model.training else "eval"]
        count = scores.tokens_B.sum()
        for name, total in likelihoods.items():
            meter.add(f"loss_{name}", total, count)
        for name, (total, _, rows) in controller.items():
            meter.add(f"loss_{name}", total, rows)
        for view in (FULL, PIXEL):
            if view in scores.correct:
                meter.add(f"token_accuracy_{view}", scores.correct[view].sum(), count)
        for view in (SEMANTIC, *scores.levels(self.level_names)):
            if view in scores.correct:
                meter.add("token_accuracy_semantic", scores.correct[view].sum(), count)
        slots_BT = inputs["input_ids"] == self.granulon.config.image_token_id
        empty = 0 if scores.semantic_mask is None else (~scores.semantic_mask).sum().to(slots_BT.device)
        read = inputs["attention_mask"].sum() - empty
        meter.add("visual_token_share", slots_BT.sum() - empty, read)
        meter.add("tokens_per_second", read, 0)
        if scores.granularity_index is not None:
            self._measure_levels(meter, inputs, scores, nll_BS)

    def _measure_levels(self, meter: Meter, inputs: dict, scores: AnswerScores, nll_BS):
        """How often each level acts, how well the answers are read at it, and how good the controller's choice is."""
        levels, asked_B, tokens_B = scores.levels(self.level_names), self._asked_rows(inputs), scores.tokens_B
        if scores.granularity_logits is not None:
            entropy_B = torch.distributions.Categorical(logits=scores.granularity_logits.float()).entropy()
            meter.add("controller_entropy", (entropy_B * asked_B).sum(), asked_B.sum())
            if len(levels) == len(self.level_names):
                best_B = nll_BS.argmin(1) == scores.granularity_logits.argmax(1)
                meter.add("controller_agreement", (best_B & asked_B).sum(), asked_B.sum())
        seeing_B = (inputs["input_ids"] == self.granulon.config.image_token_id).any(-1)
        for place, name in enumerate(levels):
            meter.add(f"loss_semantic/{name}", (nll_BS[:, place] * seeing_B).sum(), (tokens_B * seeing_B).sum())
        for level, name in enumerate(self.level_names):
            chosen_B = seeing_B & (scores.granularity_index == level)
            meter.add(f"level_share/{name}", chosen_B.sum(), seeing_B.sum())
            level_tokens = (tokens_B * chosen_B).sum()
            meter.add(f"loss/{name}", -(scores.log_probs[FULL].sum(-1) * chosen_B).sum(), level_tokens)
            meter.add(f"token_accuracy/{name}", (scores.correct[FULL].sum(-1) * chosen_B).sum(), level_tokens)


@dataclass
class GranulonCollator(DataCollatorForVisionLanguageModeling):
    """TRL's collator, with `granularity_labels` (B,) long, -100 where a row names no level; it cuts nothing.

    levels: names of the model's levels; without any, the rows' levels are left aside.
    visual_view: "full", "pixel" or "semantic": which image tokens the prompts have slots for.
    longest: the most tokens that a row may have.
    """

    levels: list[str] = field(default_factory=list)
    longest: int | None = None
    visual_view: str = FULL

    def __post_init__(self):
        self.processor = self.processor.for_view(self.visual_view)

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


def head_of(model):
    """The `GranulonForConditionalGeneration`, with or without adapters around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def parameter_groups(model, granulon) -> dict[str, list]:
    """The parameters that train, by the part of the model they belong to."""
    groups, taken = {}, set()
    parts = {"projector": granulon.multi_modal_projector, "controller": granulon.granularity_controller}
    for part, module in (*parts.items(), ("language model", model)):
        owned = [] if module is None else module.parameters()
        groups[part] = [parameter for parameter in owned if parameter.requires_grad and id(parameter) not in taken]
        taken |= {id(parameter) for parameter in groups[part]}
    return groups


def meter_names(levels: list[str]) -> list[str]:
    by_level = ("level_share", "loss", "token_accuracy", "loss_semantic")
    losses = [f"loss_{part}" for part in (*LIKELIHOODS, *CONTROLLER_PARTS)]
    accuracies = [f"token_accuracy_{view}" for view in (FULL, PIXEL, SEMANTIC)]
    others = ["controller_entropy", "controller_agreement", "visual_token_share", "tokens_per_second"]
    return [*losses, *accuracies, *others, *(f"{name}/{level}" for name in by_level for level in levels)]
