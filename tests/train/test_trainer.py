"""The joint objective in training: the same losses and gradients however they are computed, nothing else changed."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import make_image, make_model, make_processor
from datasets import Dataset
from peft import LoraConfig

from granulon.train.arguments import GranulonSFTConfig
from granulon.train.controller.replay import QuestionReplay
from granulon.train.trainer import GranulonTrainer

ANSWERS = ["a dog", "two large cats on a sofa", "no", "blue, and then some more words", "x", "yes", "seven", "a car"]
LEVELS = ["coarse", None, "coarse", "coarse", "fine", None, "coarse", "fine"]
PARTS = ("task", "pixel", "semantic", "controller", "labels")
THREE_LEVELS = [
    {"name": name, "stride": stride, "clusters": 7 - stride, "keep": 6 - stride}
    for name, stride in (("coarse", 3), ("medium", 2), ("fine", 1))
]
WEIGHTS = {"task": 1, "pixel": 0.5, "semantic": 0.5, "controller": 0.3, "labels": 0.3}


def make_rows(images=(1, 2, 0, 1, 1, 0, 1, 1)):
    rows = []
    for number, (answer, level, count) in enumerate(zip(ANSWERS, LEVELS, images, strict=True)):
        text = {"type": "text", "text": f"question {'long ' * (number % 3)}{number}?"}
        rows.append(
            {
                "prompt": [{"role": "user", "content": [{"type": "image"}] * count + [text]}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
                "images": [make_image(number + seed) for seed in range(count)],
                "granularity": level,
            }
        )
    return rows


def make_trainer(folder, rows=None, model=None, processor=None, eval_rows=None, peft_config=None, **arguments):
    settings = {
        "per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 1e-3, "granularity_loss_weight": 0.3,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "bf16": False, "use_cpu": True,
        "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    args = GranulonSFTConfig(output_dir=str(folder), **settings | arguments)
    datasets = [None if entry is None else Dataset.from_list(entry) for entry in (rows or make_rows(), eval_rows)]
    return GranulonTrainer(
        model or make_model(), args, processor or make_processor(), train_dataset=datasets[0],
        eval_dataset=datasets[1], peft_config=peft_config,
    )  # fmt: skip


def loss_and_gradients(trainer, rows, accumulate=1):
    """Parts, loss and gradients of one step over the rows, in `accumulate` batches."""
    trainer.model.train()
    trainer.model.zero_grad()
    size = len(rows) // accumulate
    batches = iter([trainer.data_collator(rows[start : start + size]) for start in range(0, len(rows), size)])
    batches, count = trainer.get_batch_samples(batches, accumulate, trainer.args.device)
    losses = []
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
        loss.backward()
        losses.append(loss.detach())
    means = trainer.meters["train"].read(trainer.accelerator)
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return {part: means.get(f"loss_{part}", 0.0) for part in PARTS}, sum(losses), gradients


def close(first, second, tolerance):
    """Parts, loss, and gradients relative to the length of the whole gradient: some parameters' own cancel out."""
    parts, loss, gradients = first
    for part in PARTS:
        assert parts[part] == pytest.approx(second[0][part], rel=tolerance), part
    assert loss.item() == pytest.approx(second[1].item(), rel=tolerance)
    assert gradients.keys() == second[2].keys()
    length = torch.nn.utils.get_total_norm(list(gradients.values()))
    for name, gradient in gradients.items():
        assert (gradient - second[2][name]).norm() <= tolerance * length, name


@pytest.mark.parametrize("decoder", ["qwen2", "llama"])
@pytest.mark.parametrize("images", [(1, 2, 0, 1, 1, 0, 1, 1), (0,) * 8, (1,) * 8])
def test_one_packed_pass_gives_the_losses_and_gradients_of_separate_passes(tmp_path, decoder, images):
    model = make_model(decoder=decoder, granularities=THREE_LEVELS)
    gains = 1 + model.model.multi_modal_projector.gain_offsets
    assert (gains[:, None] - gains).abs().sum(-1).fill_diagonal_(9).min() > 0.1, "gains are unequal"
    rows, trainer = make_rows(images), make_trainer(tmp_path, model=model)
    packed = loss_and_gradients(trainer, rows)
    trainer.packs_views = False
    close(packed, loss_and_gradients(trainer, rows), 1e-5)


def test_batches_of_any_size_add_up_to_the_same_step(tmp_path):
    trainer, rows = make_trainer(tmp_path), make_rows()
    together = loss_and_gradients(trainer, rows)
    for accumulate in (2, 8):
        close(together, loss_and_gradients(trainer, rows, accumulate), 1e-6)


def test_prompts_of_semantic_tokens_alone_are_read_at_the_level_that_each_row_names(tmp_path):
    rows, plain = make_rows(images=(1, 2, 0, 1, 1, 0, 1, 1)), {"pixel_loss_weight": 0.0, "semantic_loss_weight": 0.0}
    options = {"visual_view": "semantic", "level_from_rows": True, "granularity_loss_weight": 0.0, **plain}
    model = make_model(granularities=THREE_LEVELS)
    trainer = make_trainer(tmp_path, rows, model=model, **options)
    parts, loss, _ = loss_and_gradients(trainer, rows)
    batch, full = trainer.data_collator(rows), make_trainer(tmp_path, rows, model=make_model()).data_collator(rows)
    assert batch["input_ids"].shape[1] < full["input_ids"].shape[1]
    total, tokens = 0.0, 0
    for row in rows:
        inputs = full_collator(trainer)([row])
        inputs.pop("granularity_labels")
        level = None if row["granularity"] is None or not row["images"] else row["granularity"]
        tokens += (inputs["labels"] != -100).sum().item()
        view = {"granularity": level, "visual_view": "semantic"} if row["images"] else {}
        with torch.no_grad():
            logits = trainer.model(**{k: v for k, v in inputs.items() if k != "labels"}, **view).logits
        target = inputs["labels"][:, 1:]
        total += torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten(), reduction="sum")
    assert parts["task"] == pytest.approx(total.item() / tokens, rel=1e-5) == pytest.approx(loss.item(), rel=1e-5)


def full_collator(trainer):
    """The trainer's collator, for full prompts."""
    collator = copy.copy(trainer.data_collator)
    collator.processor = trainer.processing_class
    return collator


def test_one_view_alone_has_no_partial_views(tmp_path):
    with pytest.raises(ValueError, match="'semantic', which has no partial views"):
        make_trainer(tmp_path, visual_view="semantic")
    with pytest.raises(ValueError, match="visual_view is 'coarse'; choose one of"):
        make_trainer(tmp_path, visual_view="coarse")


def test_rows_of_similar_length_share_a_batch_if_their_length_is_known(tmp_path):
    rows = [row | {"length": number % 2 * 50} for number, row in enumerate(make_rows())]
    trainer = make_trainer(
        tmp_path, rows, per_device_train_batch_size=4, train_sampling_strategy="group_by_length", max_steps=2
    )
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(8)) and {frozenset(order[:4]), frozenset(order[4:])} == {
        frozenset(range(0, 8, 2)), frozenset(range(1, 8, 2))
    }  # fmt: skip
    trainer.train()


def test_each_part_is_what_its_equation_says(tmp_path):
    trainer, rows = make_trainer(tmp_path, token_cost=0.7, level_exploration=0.2), make_rows()
    parts, loss, _ = loss_and_gradients(trainer, rows)
    batch = trainer.data_collator(rows)
    labelled, tokens = batch.pop("granularity_labels"), (batch["labels"] != -100).sum(-1)
    with torch.no_grad():
        chosen = trainer.model(**batch)
        for part, view in (("task", None), ("pixel", "pixel")):
            alone = trainer.model(**batch, granularity=chosen.granularity_index, visual_view=view)
            assert parts[part] == pytest.approx(alone.loss.item(), rel=1e-5)
        nll = torch.stack([row_losses(trainer.model, batch, level) for level in ("coarse", "fine")], dim=1)
    seeing = torch.tensor([True, True, False, True, True, False, True, True])
    p = chosen.granularity_logits.softmax(-1)
    w = 0.8 * torch.where(seeing[:, None], p, 0.5) + 0.1
    assert parts["semantic"] == pytest.approx(((w * nll).sum() / tokens.sum()).item(), rel=1e-5)
    cost = nll + 0.7 * torch.tensor([2 / 5, 5 / 5])
    marginal = (p.log() - cost).logsumexp(-1)
    assert parts["controller"] == pytest.approx(-marginal[seeing].mean().item(), rel=1e-5)
    named = seeing & (labelled != -100)
    entropy = torch.nn.functional.cross_entropy(chosen.granularity_logits[named], labelled[named])
    assert parts["labels"] == pytest.approx(entropy.item(), rel=1e-5)
    assert loss.item() == pytest.approx(sum(WEIGHTS[part] * parts[part] for part in PARTS), rel=1e-5)


def row_losses(model, batch, level):
    """Negative log-likelihood of each row's answer from the semantic tokens of one level, (B,)."""
    logits = model(**batch, granularity=level, visual_view="semantic").logits[:, :-1].log_softmax(-1)
    target = batch["labels"][:, 1:]
    return -(logits.gather(-1, target.clamp_min(0)[..., None])[..., 0] * (target != -100)).sum(-1)


def test_the_answers_lengths_do_not_weigh_the_levels_that_rows_name(tmp_path):
    rows = make_rows()
    parts = []
    for length in (1, 30):
        for row in rows:
            row["completion"][0]["content"][0]["text"] = "x" * (length if row["granularity"] == "fine" else 1)
        parts.append(loss_and_gradients(make_trainer(tmp_path), rows)[0])
    assert parts[0]["labels"] == pytest.approx(parts[1]["labels"], rel=1e-6)
    assert parts[0]["task"] != pytest.approx(parts[1]["task"], rel=1e-2)


def test_the_controller_learns_from_the_likelihoods_alone(tmp_path):
    rows = make_rows()
    for row in rows:
        row["granularity"] = None
    trainer = make_trainer(tmp_path)
    _, _, gradients = loss_and_gradients(trainer, rows)
    controller = {name: g for name, g in gradients.items() if "granularity_controller" in name}
    assert all(gradient.abs().sum() > 0 for gradient in controller.values()) and controller


def test_levels_can_be_drawn_for_each_step(tmp_path):
    rows = [row | {"granularity": None} for row in make_rows()]
    trainer = make_trainer(tmp_path, rows, make_model(granularities=THREE_LEVELS), levels_per_step=2)
    drawn = set()
    for step in range(8):
        trainer.state.global_step = step
        views = trainer._views()
        assert views == trainer._views() and len(views) == 4
        drawn.add(views[2:])
    assert len(drawn) == 3
    trainer.train()


def test_replayed_questions_teach_the_controller(tmp_path):
    words = {"coarse": "place", "fine": "text"}
    corpus = [
        {"question": f"which {word} number {n}?", "level": level, "split": "train"}
        for level, word in words.items()
        for n in range(20)
    ]
    model, processor = make_model(), make_processor()
    settings = {"max_steps": 30, "granularity_loss_weight": 1.0, "learning_rate": 1e-2}
    trainer = make_trainer(tmp_path, model=model, processor=processor, **settings)
    trainer.replay = QuestionReplay(corpus, processor, ["coarse", "fine"])
    trainer.train()
    losses = [entry["loss_replay"] for entry in trainer.state.log_history if "loss_replay" in entry]
    assert losses[-1] < 0.5 * losses[0]


def test_the_logits_of_a_whole_sequence_are_never_made(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(trainer.model.lm_head, "forward", lambda states: pytest.fail("the head ran on its own"))
    loss_and_gradients(trainer, make_rows())


def test_a_view_without_weight_is_not_packed(tmp_path):
    weights = {"pixel_loss_weight": 0.0, "semantic_loss_weight": 0.0, "granularity_loss_weight": 0.0}
    trainer, lengths = make_trainer(tmp_path, **weights), []
    trainer.granulon.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    batch = trainer.data_collator(make_rows())
    trainer.compute_loss(trainer.model, dict(batch))
    assert lengths[-1] == batch["input_ids"].shape[1]
    assert trainer.meters["train"].read(trainer.accelerator).keys().isdisjoint({"loss_pixel", "loss_semantic"})


def test_training_learns_and_leaves_the_tower_as_it_was(tmp_path):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(tmp_path, model=model, max_steps=24, learning_rate=3e-3)
    trainer.train()
    losses = [entry["loss_task"] for entry in trainer.state.log_history if "loss_task" in entry]
    assert losses[-1] < 0.8 * losses[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == ("vision_tower" in name), name
    assert not trainer.granulon.vision_tower.training


def test_tied_weights_stay_tied(tmp_path):
    model = make_model(tie_word_embeddings=True)
    make_trainer(tmp_path, model=model, max_steps=2).train()
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_step_logs_every_part_and_evaluation_every_level(tmp_path):
    trainer = make_trainer(tmp_path, eval_rows=make_rows(), eval_strategy="steps", eval_steps=1)
    trainer.train()
    step = next(entry for entry in trainer.state.log_history if "loss" in entry)
    wanted = {f"loss_{part}" for part in PARTS} | {f"token_accuracy_{view}" for view in ("full", "pixel", "semantic")}
    wanted |= {
        "controller_entropy",
        "visual_token_share",
        "tokens_per_second",
        "peak_memory_gb",
        "mean_token_accuracy",
    }
    assert wanted <= step.keys()
    shares = [step[f"level_share/{level}"] for level in ("coarse", "fine")]
    assert sum(shares) == pytest.approx(1)
    evaluated = next(entry for entry in trainer.state.log_history if "eval_loss" in entry or "eval_loss_task" in entry)
    assert any(key.startswith("eval_loss/") for key in evaluated)
    assert step["loss"] == pytest.approx(sum(WEIGHTS[part] * step[f"loss_{part}"] for part in PARTS), abs=1e-3)


def test_evaluation_between_two_log_lines_takes_no_time_from_training(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("granulon.train.trainer.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    steps = {"max_steps": 3, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, eval_rows=make_rows(), **steps)
    trainer.train()
    trained = next(entry for entry in trainer.state.log_history if "loss" in entry)
    evaluated = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    # By this clock each step, each evaluation and each line of the log takes a second, and all read the same rows.
    assert trained["tokens_per_second"] * 4 / 3 == pytest.approx(evaluated["eval_tokens_per_second"])


def test_the_share_of_a_gpus_operations_follows_from_tokens_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr("granulon.train.trainer.peak_flops", lambda device: 1e9)
    rows = [row | {"images": []} for row in make_rows((0,) * 8)]
    plain = {"pixel_loss_weight": 0.0, "semantic_loss_weight": 0.0, "granularity_loss_weight": 0.0}
    trainer = make_trainer(tmp_path, rows, **plain)
    trainer.train()
    step = next(entry for entry in trainer.state.log_history if "loss" in entry)
    weights = sum(weight.numel() for weight in trainer.granulon.language_model.layers.parameters())
    assert step["mfu"] == pytest.approx(step["tokens_per_second"] * 6 * weights / 1e9)


@pytest.mark.parametrize("arguments", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_losses_that_the_objective_does_not_hold_are_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match="leave them at 'nll' and 0"):
        make_trainer(tmp_path, **arguments)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_weights_change(tmp_path, what):
    model = make_model()
    trainer = make_trainer(tmp_path, model=model)
    if what == "loss":
        model.model.language_model.norm.weight.data.fill_(float("nan"))
    else:
        model.model.multi_modal_projector.linear_2.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="step 1: the loss of task" if what == "loss" else "of projector is"):
        trainer.train()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0, equal_nan=True)


def test_a_row_that_is_too_long_is_refused_and_never_cut(tmp_path):
    trainer = make_trainer(tmp_path, max_length=60)
    with pytest.raises(ValueError, match=r"row 1 of a batch has \d+ tokens and max_length is 60"):
        trainer.data_collator(make_rows((0, 1, 0, 0, 0, 0, 0, 0)))


def test_a_level_that_the_model_does_not_have_is_refused(tmp_path):
    rows = make_rows()
    rows[3]["granularity"] = "atomic"
    with pytest.raises(ValueError, match="row 3 .*'atomic'.*coarse"):
        make_trainer(tmp_path).data_collator(rows)


def test_a_plain_encoder_trains_and_refuses_views_that_it_has_not(tmp_path):
    plain = {"model": make_model(granularities=[]), "processor": make_processor(num_semantic_tokens=0)}
    with pytest.raises(ValueError, match="one view"):
        make_trainer(tmp_path, **plain, granularity_loss_weight=0.0)
    none = {"pixel_loss_weight": 0.0, "semantic_loss_weight": 0.0, "granularity_loss_weight": 0.0}
    trainer = make_trainer(tmp_path, **plain, **none)
    trainer.train()
    assert "loss_task" in trainer.state.log_history[0]


def test_adapters_train_with_projector_and_controller(tmp_path):
    lora = LoraConfig(
        r=2,
        target_modules=r"model\.language_model\..*\.(q_proj|v_proj)",
        modules_to_save=["multi_modal_projector", "granularity_controller"],
    )
    trainer = make_trainer(tmp_path, peft_config=lora, max_steps=2)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert any("lora" in name for name in changed) and any("multi_modal_projector" in name for name in changed)
    assert all("lora" in name or "modules_to_save" in name for name in changed)
