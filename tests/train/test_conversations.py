"""Rows of several answers: what is learned from them is what as many rows of one answer teach."""

import copy

import pytest
import torch
from conftest import make_image, make_model, make_processor
from datasets import Dataset
from test_trainer import THREE_LEVELS, close, loss_and_gradients, make_trainer

from granulon.train.answer_scores import Answers
from granulon.train.collator import GranulonCollator
from granulon.train.data import load_rows
from granulon.train.data.conversations import Rendered, render_answers
from granulon.train.data.rows import Check, training_row, turns_of
from modeling_granulon.image_tokens import FULL, PIXEL

LEVELS = ["coarse", "medium", "fine"]


def message(role, text, images=0):
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def make_conversations():
    """Of four, three and two answers, an image at the start, at the start and later, or none; and a single answer."""
    shapes = [((1, 0, 0, 0), [0, 2, 0, 1]), ((1, 0, 2), [1, 1, 0]), ((0, 0), [2, 0]), ((1,), [2])]
    rows = []
    for number, (images, levels) in enumerate(shapes):
        messages = []
        for turn, count in enumerate(images):
            messages.append(message("user", f"question {'long ' * turn}{number} {turn}?", count))
            messages.append(message("assistant", f"{'many ' * (turn * 3 % 5)}answer {number}"))
        rows.append(
            {
                "prompt": messages[:1],
                "completion": messages[1:],
                "images": [make_image(10 * number + seed) for seed in range(sum(images))],
                "granularity": [LEVELS[level] for level in levels] if len(levels) > 1 else LEVELS[levels[0]],
            }
        )
    return rows


def one_by_one(rows):
    """The same answers, each with a row of its own."""
    return [training_row([turn]) | {"images": turn.images} for row in rows for turn in turns_of(row)]


def decide_by_question(model, batch):
    """Centre the controller's logits, so that its choice differs from question to question; the choices."""
    with torch.no_grad():
        logits = model.model.question_logits(batch["question_input_ids"], batch["question_attention_mask"])
        model.model.granularity_controller.linear_2.bias -= logits[:4].mean(0)
    return (logits - logits[:4].mean(0)).argmax(-1)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("decoder", ["qwen2", "llama"])
def test_conversations_give_the_losses_and_gradients_of_separate_rows(tmp_path, decoder, by_name, packs):
    model, rows = make_model(decoder=decoder, granularities=THREE_LEVELS), make_conversations()
    trainer = make_trainer(tmp_path, one_by_one(rows), model=model, level_from_rows=by_name)
    trainer.packs_views = packs
    batch = trainer.data_collator(rows)
    assert len(batch["question_input_ids"]) == len(batch["granularity_labels"]) == len(one_by_one(rows)) == 10
    assert len(set(decide_by_question(model, batch)[:4].tolist())) > 1, "answers of a row are read at different levels"
    close(loss_and_gradients(trainer, rows), loss_and_gradients(trainer, one_by_one(rows)), 1e-5)


def test_a_conversation_is_read_once_per_level_and_its_images_pass_the_tower_once(tmp_path):
    model, rows = make_model(granularities=THREE_LEVELS), make_conversations()
    trainer = make_trainer(tmp_path, one_by_one(rows), model=model, level_from_rows=True)
    seen, read = [], []
    tower = model.model.vision_tower.register_forward_hook(lambda m, a, k, out: seen.append(k), with_kwargs=True)
    decoder = model.model.language_model.register_forward_hook(
        lambda m, a, k, out: read.append(k["inputs_embeds"]), with_kwargs=True
    )
    loss_and_gradients(trainer, rows)
    tower.remove(), decoder.remove()
    images = sum(len(row["images"]) for row in rows)
    assert [len(call["pixel_values"]) for call in seen] == [images]
    assert [len(embeds) for embeds in read] == [3 + 2 + 1 + 1]


def test_rows_of_one_answer_are_batches_that_the_model_takes(tmp_path):
    trainer = make_trainer(tmp_path, one_by_one(make_conversations()), model=make_model(granularities=THREE_LEVELS))
    batch = trainer.data_collator(one_by_one(make_conversations()))
    batch.pop("granularity_labels")
    assert trainer.model(**batch).loss.isfinite()


def test_answers_know_their_rows_and_whether_an_image_stands_before_them(tmp_path):
    trainer, rows = make_trainer(tmp_path, model=make_model(granularities=THREE_LEVELS)), make_conversations()
    batch = trainer.data_collator(rows)
    answers = Answers.of(batch["labels"], batch["answer_ids"])
    assert answers.row_A.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]
    sees = answers.see(batch["input_ids"] == trainer.model.config.image_token_id)
    assert sees.tolist() == [True] * 7 + [False] * 2 + [True]
    late = copy.deepcopy(rows[1])
    late["prompt"][0]["content"], late["images"] = late["prompt"][0]["content"][1:], late["images"][1:]
    batch = trainer.data_collator([late])
    answers = Answers.of(batch["labels"], batch["answer_ids"])
    assert answers.see(batch["input_ids"] == trainer.model.config.image_token_id).tolist() == [False, False, True]


def test_the_controller_is_compared_with_named_levels_level_by_level(tmp_path):
    model, rows = make_model(granularities=THREE_LEVELS), make_conversations()
    trainer = make_trainer(tmp_path, one_by_one(rows), model=model)
    batch = trainer.data_collator(rows)
    chosen = decide_by_question(model, batch)
    with torch.no_grad():
        trainer.compute_loss(model.train(), dict(batch))
    means = trainer.meters["train"].read(trainer.accelerator)
    asked = torch.tensor([True] * 7 + [False] * 2 + [True])
    hit, labels = (chosen == batch["granularity_labels"])[asked], batch["granularity_labels"][asked]
    assert means["controller_accuracy"] == pytest.approx(hit.float().mean().item())
    for level, name in enumerate(LEVELS):
        assert means[f"controller_accuracy/{name}"] == pytest.approx(hit[labels == level].float().mean().item())
    assert {"controller_agreement", "padding_share"} <= means.keys()


def test_flex_attention_reads_the_packed_views_as_a_dense_mask_does(tmp_path):
    model, rows = make_model(granularities=THREE_LEVELS), make_conversations()
    trainer = make_trainer(tmp_path, one_by_one(rows), model=model)
    batch = trainer.data_collator(rows)
    batch.pop("granularity_labels")
    scores = {}
    for attention in ("sdpa", "flex_attention"):
        model.set_attn_implementation({"text_config": attention})
        # torch has no gradients of FlexAttention on a CPU, and compiling it would take longer than this test.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            scores[attention] = model(**batch, views=(FULL, PIXEL, *LEVELS)).log_probs
    for view, dense in scores["sdpa"].items():
        assert torch.allclose(scores["flex_attention"][view], dense, atol=1e-5), view


@pytest.mark.parametrize(("limit", "longest", "expected"), [
    (None, None, [(3, 4)]), (1, None, [(0, 1), (1, 1), (2, 1), (3, 1)]), (3, None, [(2, 3), (3, 1)]),
    (None, "two", [(1, 2)]),
])  # fmt: skip
def test_a_conversation_is_split_where_its_limits_say(limit, longest, expected):
    processor = make_processor()
    row = make_conversations()[0]
    turns, pictures = turns_of(row), row["images"]
    lengths = [Check(processor, LEVELS)(turn, pictures) for turn in turns]
    check = Check(processor, LEVELS, lengths[1] if longest else None, answers_per_row=limit)
    entries = list(check.rows(turns, pictures))
    assert [(turn, answers) for turn, answers, _, reason in entries if reason is None] == expected
    assert len([reason for *_, reason in entries if reason]) == (2 if longest else 0)
    for turn, answers, length, reason in entries:
        assert reason or length <= lengths[turn]
        shared = training_row(turns[turn + 1 - answers : turn + 1]) | {"images": pictures}
        if reason is None:
            collated = GranulonCollator(processor, completion_only_loss=True, levels=LEVELS)([shared])
            assert collated["attention_mask"].sum() == length


def test_an_invalid_answer_parts_a_conversation_and_the_others_stay():
    row = make_conversations()[0]
    row["granularity"][1] = "huge"
    entries = list(Check(make_processor(), LEVELS, answers_per_row=None).rows(turns_of(row), row["images"]))
    assert [(turn, answers) for turn, answers, _, _ in entries] == [(0, 1), (1, 1), (3, 2)]
    assert "its level is 'huge'" in entries[1][3]


def test_a_template_that_rewrites_earlier_turns_gives_one_answer_per_row():
    processor = make_processor()
    processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
        "{{ part['text'] if part['type'] == 'text' else '<|image_pad|>' }}{% endfor %}"
        "{% if loop.last %} (latest){% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = make_conversations()[2]
    entries = list(Check(processor, LEVELS, answers_per_row=None).rows(turns_of(row), row["images"]))
    assert [(turn, answers) for turn, answers, _, _ in entries] == [(0, 1), (1, 1)]
    with pytest.raises(ValueError, match="set answers_per_row to 1"):
        render_answers(processor, row["prompt"], row["completion"])


def test_a_turn_adds_what_the_earlier_one_lacks():
    earlier = Rendered("ask ", "say ")
    later = Rendered("ask say ask again ", "say again")
    assert later.continues(earlier) and later.after(earlier) == "ask again "
    assert later.after(None) == later.prompt and not earlier.continues(later)


def test_an_epoch_has_as_many_rows_as_the_source_has_conversations(tmp_path):
    conversations = []
    for number in range(24):
        turns = [{"from": who, "value": f"{who} {number} {turn}"} for turn in range(5) for who in ("human", "gpt")]
        conversations.append({"conversations": turns[: 2 + 2 * (number % 5)]})
    answers = sum(len(entry["conversations"]) // 2 for entry in conversations)
    given = {"seed": 0, "quarantine": tmp_path / "bad.jsonl"}
    for limit, expected in ((None, 24), (1, answers)):
        rows = load_rows([Dataset.from_list(conversations)], make_processor(), answers_per_row=limit, **given)
        stream = load_rows(
            [Dataset.from_list(conversations)], make_processor(), answers_per_row=limit, streaming=True, **given
        )
        texts = [str(row["prompt"] + row["completion"]) for row in rows]
        assert len(rows) == expected and sorted(texts) == sorted(
            str(row["prompt"] + row["completion"]) for row in stream
        )
    trainer = make_trainer(tmp_path, max_steps=-1, per_device_train_batch_size=4, num_train_epochs=1)
    rows = load_rows([Dataset.from_list(conversations)], make_processor(), answers_per_row=None, **given)
    trainer.train_dataset = rows
    assert len(trainer.get_train_dataloader()) == 6
