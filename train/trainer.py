"""Supervised fine-tuning with the joint objective: task, pixel, semantic and controller losses at once (Eq. 9-11).

`SFTTrainer` with a loss of its own: the answers are scored under every view in one pass (answer_scores.py) and the
losses of the views are added. Every likelihood is a sum over answer tokens divided by the answer tokens of the whole
step, and every part of the controller's loss a sum over questions divided by their number in the step, so that neither
gradient accumulation nor the number of devices changes what is learned.

Shapes by suffix: B rows, T prompt tokens, A answers of all rows, each with its question, G levels, S levels of this
step.
"""

import time
from copy import copy
from pathlib import Path

import torch
from datasets import IterableDataset
from torch.nn import functional as F
from transformers import ProgressCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from granulon.train.controller.replay import QuestionReplay
from granulon.train.data.streams import endless
from modeling_granulon.image_tokens import FULL, PIXEL, SEMANTIC
from modeling_granulon.joint_views import PACKABLE

from .answer_scores import Answers, AnswerScores, add_answer_scores
from .arguments import GranulonSFTConfig
from .checkpoints import finish_checkpoint, remove_checkpoint
from .collator import GranulonCollator
from .eval_answers import exact_matches
from .meters import Meter, peak_flops, peak_memory_gb
from .sampling import GroupedByLength
from .sharding import GatherInStep, gradient_norms, set_up_sharding, whole_weights
from .vision_cache import VisionCache

LIKELIHOODS = ("task", "pixel", "semantic")  # parts of the loss that count answer tokens
CONTROLLER_PARTS = ("controller", "labels", "replay")  # parts that count questions
SHOWN = ("loss_task", "loss_pixel", "loss_semantic", "token_accuracy_full", "tokens_per_second")  # in the progress bar


class GranulonTrainer(SFTTrainer):
    """
    `SFTTrainer` that adds the pixel-only, the semantic-only and the controller's loss, and logs each part.

    Takes what `SFTTrainer` takes; `args` is a `GranulonSFTConfig`, `processing_class` a `GranulonProcessor`. Rows are
    prompts and completions with `images`, or `messages` with `assistant_only_loss`, and may name their level, or that
    of each answer, in a column `granularity`. A stream starts again where it ends; `max_steps` says when to stop.

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
        if isinstance(kwargs.get("train_dataset"), IterableDataset):
            rows, workers = kwargs["train_dataset"], args.dataloader_num_workers
            kwargs["train_dataset"] = endless(rows, args.world_size, workers)
            if args.accelerator_config.dispatch_batches is None:
                args.accelerator_config.dispatch_batches = False  # each process reads its own shards
        args = copy(args)  # older checkpoints are deleted by finish_checkpoint, once the new one is complete
        self.save_total_limit, args.save_total_limit = args.save_total_limit, None
        super().__init__(
            model=model, args=args, processing_class=processing_class, data_collator=data_collator, **kwargs
        )
        add_answer_scores(head_of(self.model))
        self.granulon = head_of(self.model).model
        set_up_sharding(self.accelerator.state, self.granulon)
        self.add_callback(GatherInStep(head_of(self.model)))
        if getattr(model, "is_quantized", False):  # upstream made what trains bfloat16, too coarse for small updates
            for parameter in self.model.parameters():
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        if args.eval_answers and (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            raise ValueError("eval_answers needs whole weights on each process; set it to 0, or use DDP or ZeRO-2")
        if self.args.vision_cache:
            VisionCache(self.granulon, self.args.vision_cache, self.args.process_index).attach()
        self.packs_views = config.text_config._attn_implementation in PACKABLE
        self.replay, self.questions_of_step = replay, None
        self.meters = {mode: Meter(meter_names(self.level_names), self.args.device) for mode in ("train", "eval")}
        self.timed_until, self.peak_flops = time.perf_counter(), peak_flops(self.args.device)
        self.flops_per_token, self.flops_per_image_token = self._flops()
        if any(type(callback) is ProgressCallback for callback in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(PartsInProgressBar)

    def _get_train_sampler(self, train_dataset=None):
        """As upstream; rows whose length is known are grouped by length, if the arguments ask for it."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        return self._by_length(rows, self._train_batch_size) or super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset):
        return self._by_length(eval_dataset, self.args.eval_batch_size) or super()._get_eval_sampler(eval_dataset)

    def _by_length(self, rows, batch: int) -> GroupedByLength | None:
        if self.args.train_sampling_strategy != "group_by_length" or "length" not in (
            getattr(rows, "column_names", None) or ()
        ):
            return None
        lengths = rows.with_format("numpy")["length"][:]
        return GroupedByLength(lengths, batch * self.args.world_size, self.args.seed)

    def get_batch_samples(self, *args, **kwargs):
        """As upstream; also counts the step's questions over all processes, which divide the controller's losses.

        A run that is resumed at `max_steps` takes no further step.
        """
        if 0 < self.args.max_steps <= self.state.global_step:
            return [], None
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self.learns_levels and batches:
            self.questions_of_step = self.accelerator.reduce(sum(map(self._count_questions, batches)), reduction="sum")
        return batches, num_items

    def create_optimizer(self, model=None):
        """As upstream; the tower's blocks are groups of their own, if they have a learning rate of their own."""
        optimizer, rate = super().create_optimizer(model), self.args.vision_learning_rate
        vision = set(self.granulon.vision_tower.parameters())
        for group in list(optimizer.param_groups) if rate is not None else []:
            own = [parameter for parameter in group["params"] if parameter in vision]
            if own:
                group["params"] = [parameter for parameter in group["params"] if parameter not in vision]
                optimizer.add_param_group(group | {"params": own, "lr": rate})
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The joint objective of a batch, and TRL's own metrics of the full view."""
        label_A = inputs.pop("granularity_labels", None)
        named = None
        if self.args.level_from_rows and label_A is not None:
            named = [level if level >= 0 else None for level in label_A.tolist()]
        scores = model(**inputs, views=self._views(), packed=self.packs_views, granularity=named)
        super().compute_loss(lambda **_: scores.full, dict(inputs), num_items_in_batch=num_items_in_batch)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        if num_items_in_batch is None:
            tokens, processes = scores.full.label_mask.sum(), 1
        else:  # the count is that of all processes, and their gradients are averaged
            tokens = torch.as_tensor(num_items_in_batch, device=self.args.device)
        asked_A = self._asked(inputs)
        nll_AS, logits_AS = self._levels(scores, asked_A)
        likelihoods = self._likelihoods(scores, nll_AS, logits_AS)
        controller = self._controller_losses(scores, asked_A, label_A, nll_AS, logits_AS)
        self._stop_unless_finite(likelihoods | {name: total for name, (total, *_) in controller.items()}, "loss")
        self._measure(scores, likelihoods, controller, asked_A, label_A, nll_AS)

        weights = dict(zip(LIKELIHOODS, (1, self.args.pixel_loss_weight, self.args.semantic_loss_weight)))
        loss = sum(weights[name] * total for name, total in likelihoods.items()) / tokens.clamp_min(1)
        for total, questions, _ in controller.values():
            loss = loss + self.args.granularity_loss_weight * total / questions.clamp_min(1)
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

    def _levels(self, scores: AnswerScores, asked_A) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Each level's negative log-likelihood of the answers, and the controller's logits of these levels.

        (A,S) each, or None without levels. An answer whose level the controller does not choose has equal logits.
        """
        levels = [level for level, name in enumerate(self.level_names) if name in scores.log_probs]
        if not levels:
            return None, None
        nll_AS = torch.stack([-scores.by_answer(scores.log_probs[self.level_names[level]]) for level in levels], dim=1)
        logits_AG = scores.granularity_logits
        if logits_AG is None:
            return nll_AS, torch.zeros_like(nll_AS)
        return nll_AS, logits_AG[:, levels].float() * asked_A.unsqueeze(-1)

    def _likelihoods(self, scores: AnswerScores, nll_AS, logits_AS) -> dict[str, torch.Tensor]:
        """The parts of Eq. 9: sums over answer tokens, in nats."""
        parts = {"task": -scores.log_probs[FULL].sum()}
        if PIXEL in scores.log_probs:
            parts["pixel"] = -scores.log_probs[PIXEL].sum()
        if SEMANTIC in scores.log_probs:
            parts["semantic"] = -scores.log_probs[SEMANTIC].sum()
        if nll_AS is not None and self.args.semantic_loss_weight > 0:
            share = self.args.level_exploration
            weights_AS = (1 - share) * logits_AS.detach().softmax(-1) + share / logits_AS.shape[1]  # no level starves
            parts["semantic"] = (weights_AS * nll_AS).sum()
        return parts

    def _controller_losses(self, scores: AnswerScores, asked_A, label_A, nll_AS, logits_AS) -> dict[str, tuple]:
        """Eq. 11: the answer's likelihood over all levels, and the cross-entropy of known and of replayed levels.

        Each part is a sum, the number of questions that divides it (of the whole step) and that of this batch.
        """
        if not self.args.granularity_loss_weight:
            return {}
        parts, logits_AG = {}, scores.granularity_logits
        if logits_AG is not None:
            own = _counts(asked_A, label_A)
            asked, labelled = (
                own if self.questions_of_step is None or not self.model.training else self.questions_of_step
            )
            if nll_AS is not None:
                cost_AS = nll_AS.detach() + self.args.token_cost * self._token_shares(scores)
                # Its gradient is p minus the posterior of the levels: none where all levels answer equally well.
                loss_A = -(logits_AS.log_softmax(-1) - cost_AS).logsumexp(-1)
                parts["controller"] = (loss_A * asked_A).sum(), asked, own[0]
            if label_A is not None:
                known_A = label_A.masked_fill(~asked_A, -100)
                parts["labels"] = F.cross_entropy(logits_AG.float(), known_A, reduction="sum"), labelled, own[1]
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

    def _asked(self, inputs: dict) -> torch.Tensor:
        """Answers with an image and a question before them, (A,) bool: those whose level the controller chooses."""
        answers = Answers.of(inputs["labels"], inputs.get("answer_ids"))
        sees_A = answers.see(inputs["input_ids"] == self.granulon.config.image_token_id)
        mask = inputs.get("question_attention_mask")
        return sees_A & mask.any(-1).to(sees_A.device) if mask is not None else torch.zeros_like(sees_A)

    def _count_questions(self, inputs: dict) -> torch.Tensor:
        """How many questions the controller chooses for, and how many of these name their level, (2,) long."""
        return _counts(self._asked(inputs), inputs.get("granularity_labels")).to(self.args.device)

    def training_step(self, *args, **kwargs):
        """As upstream; the gradients of a complete step are looked at before they change the weights."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self.accelerator.mixed_precision != "fp16":  # it skips what overflows
            groups = parameter_groups(self.model, self.granulon)
            self._stop_unless_finite(gradient_norms(groups, self.deepspeed), "gradient")
        self._count_seconds("train")
        return loss

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        """As upstream; some of the rows are also answered, if the arguments ask for it."""
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.args.eval_answers:
            self._count_seconds("eval")
            shares = exact_matches(self, head_of(self.model), dataloader.dataset)
            output.metrics.update({f"{metric_key_prefix}_{name}": share for name, share in shares.items()})
            self.timed_until = time.perf_counter()  # answering belongs to no throughput
        return output

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
        self.meters[mode].add("tokens_per_second", 0, seconds)
        if mode == "train" and self.peak_flops:
            self.meters[mode].add("mfu", 0, seconds * self.peak_flops)

    def _flops(self) -> tuple[float, float]:
        """Operations of a step for a token of the decoder and for an image token of the tower, in matrix products.

        Two per weight and token forward and two backward, and two more where the weight is trained: attention and the
        head are left out.
        """
        layers, tower = self.granulon.language_model.layers, self.granulon.vision_tower
        trained = sum(p.numel() for p in layers.parameters() if p.requires_grad)
        towers_trained = any(p.requires_grad for p in tower.parameters())
        decoder = sum(p.numel() for p in layers.parameters())
        return 4 * decoder + 2 * trained, (6 if towers_trained else 2) * sum(p.numel() for p in tower.parameters())

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
    def _measure(self, scores: AnswerScores, likelihoods: dict, controller: dict, asked_A, label_A, nll_AS):
        meter = self.meters["train" if self.model.training else "eval"]
        count = scores.full.label_mask.sum()
        for name, total in likelihoods.items():
            meter.add(f"loss_{name}", total, count)
        for name, (total, _, questions) in controller.items():
            meter.add(f"loss_{name}", total, questions)
        for view in (FULL, PIXEL):
            if view in scores.correct:
                meter.add(f"token_accuracy_{view}", scores.correct[view].sum(), count)
        for view in (SEMANTIC, *scores.levels(self.level_names)):
            if view in scores.correct:
                meter.add("token_accuracy_semantic", scores.correct[view].sum(), count)
        read = scores.text_tokens + scores.visual_tokens
        meter.add("visual_token_share", scores.visual_tokens, read)
        meter.add("padding_share", scores.slots - scores.used_slots, scores.slots)
        meter.add("tokens_per_second", read, 0)
        flops = self.flops_per_token * scores.used_slots + self.flops_per_image_token * scores.patches
        meter.add("mfu", flops, 0)
        if scores.granularity_index is not None:
            self._measure_levels(meter, scores, asked_A, label_A, nll_AS)

    def _measure_levels(self, meter: Meter, scores: AnswerScores, asked_A, label_A, nll_AS):
        """How often each level acts, how well the answers are read at it, and how good the controller's choice is."""
        levels, tokens_A, sees_A = scores.levels(self.level_names), scores.tokens_A, scores.sees_A
        if scores.granularity_logits is not None:
            entropy_A = torch.distributions.Categorical(logits=scores.granularity_logits.float()).entropy()
            meter.add("controller_entropy", (entropy_A * asked_A).sum(), asked_A.sum())
            if len(levels) == len(self.level_names):
                self._measure_choices("controller_agreement", meter, scores, nll_AS.argmin(1), asked_A)
            if label_A is not None:
                self._measure_choices("controller_accuracy", meter, scores, label_A, asked_A & (label_A >= 0))
        for place, name in enumerate(levels):
            meter.add(f"loss_semantic/{name}", (nll_AS[:, place] * sees_A).sum(), (tokens_A * sees_A).sum())
        nll_A, correct_A = -scores.by_answer(scores.log_probs[FULL]), scores.by_answer(scores.correct[FULL])
        for level, name in enumerate(self.level_names):
            chosen_A = sees_A & (scores.granularity_index == level)
            meter.add(f"level_share/{name}", chosen_A.sum(), sees_A.sum())
            level_tokens = (tokens_A * chosen_A).sum()
            meter.add(f"loss/{name}", (nll_A * chosen_A).sum(), level_tokens)
            meter.add(f"token_accuracy/{name}", (correct_A * chosen_A).sum(), level_tokens)

    def _measure_choices(self, what: str, meter: Meter, scores: AnswerScores, right_A, counted_A):
        """How often the controller chooses the right level, over all questions and over those of each level."""
        hit_A = scores.granularity_logits.argmax(1) == right_A
        meter.add(what, (hit_A & counted_A).sum(), counted_A.sum())
        for level, name in enumerate(self.level_names):
            of_level_A = counted_A & (right_A == level)
            meter.add(f"{what}/{name}", (hit_A & of_level_A).sum(), of_level_A.sum())


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
    parts |= {"vision tower": granulon.vision_tower}
    for part, module in (*parts.items(), ("language model", model)):
        owned = [] if module is None else module.parameters()
        groups[part] = [parameter for parameter in owned if parameter.requires_grad and id(parameter) not in taken]
        taken |= {id(parameter) for parameter in groups[part]}
    return groups


def meter_names(levels: list[str]) -> list[str]:
    choices = ("controller_agreement", "controller_accuracy")
    by_level = ("level_share", "loss", "token_accuracy", "loss_semantic", *choices)
    losses = [f"loss_{part}" for part in (*LIKELIHOODS, *CONTROLLER_PARTS)]
    accuracies = [f"token_accuracy_{view}" for view in (FULL, PIXEL, SEMANTIC)]
    others = ["controller_entropy", *choices, "visual_token_share", "padding_share", "tokens_per_second", "mfu"]
    return [*losses, *accuracies, *others, *(f"{name}/{level}" for name in by_level for level in levels)]


def _counts(asked_A: torch.Tensor, label_A: torch.Tensor | None) -> torch.Tensor:
    """How many questions are asked, and how many of these name their level, (2,) long."""
    labelled_A = torch.zeros_like(asked_A) if label_A is None else asked_A & (label_A != -100).to(asked_A.device)
    return torch.stack([asked_A.sum(), labelled_A.sum()])
