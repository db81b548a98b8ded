"""Answers during training: given as `granulon-ask` gives them, and judged as `granulon-evaluate` judges them."""

from types import SimpleNamespace

import pytest
from conftest import make_model, make_processor
from datasets import Dataset
from test_trainer import make_rows, make_trainer
from trl import prepare_multimodal_messages

from granulon.hub import inference
from granulon.train import eval_answers

SAID = ["A dog!", "two LARGE cats on sofa", "no idea", "blue", "x", "yes", "7", "the car"]
RIGHT = [True, True, False, False, True, True, False, True]


def make_evaluated(folder, rows, **arguments):
    settings = {"per_device_eval_batch_size": 3, "eval_strategy": "steps", "eval_steps": 1} | arguments
    return make_trainer(folder, rows, eval_rows=rows, **settings)


def levels_of(trainer, rows):
    """The controller's level of each row, one at a time."""
    chats = [[prepare_multimodal_messages(row["prompt"], row["images"])] for row in rows]
    prompts = [inference.encode(trainer.model, trainer.processing_class, chat) for chat in chats]
    index = [0 if prompt.visual is None else prompt.visual.granularity_index.item() for prompt in prompts]
    return [trainer.level_names[level] if row["images"] else None for row, level in zip(rows, index, strict=True)]


@pytest.fixture
def canned(monkeypatch):
    """The model says what `SAID` has for the number in the question."""

    def generate(model, processor, prompt, **options):
        texts = processor.batch_decode(prompt.inputs["input_ids"], skip_special_tokens=True)
        return [SAID[int(text.split("?")[0][-1])] for text in texts], []

    monkeypatch.setattr(eval_answers, "generate", generate)


def test_a_model_that_learned_an_answer_gives_it(tmp_path):
    rows = make_rows()
    for number, row in enumerate(rows):
        row["completion"][0]["content"][0]["text"] = "No." if number == 3 else "Yes."
    settings = {"max_steps": 40, "eval_steps": 40, "learning_rate": 1e-2, "eval_answers": 8}
    trainer = make_evaluated(tmp_path, rows[:3] + rows[4:], **settings)
    trainer.eval_dataset = Dataset.from_list(rows)
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "eval_exact_match" in entry)
    assert logged["eval_exact_match"] == 7 / 8
    chats = [prepare_multimodal_messages(row["prompt"], row["images"]) for row in rows]
    prompt = inference.encode(trainer.model.eval(), trainer.processing_class, chats)
    answers, _ = inference.generate(trainer.model, trainer.processing_class, prompt, max_new_tokens=8, do_sample=False)
    assert answers == ["Yes."] * 8


def test_words_count_and_articles_case_and_marks_do_not(tmp_path, canned):
    trainer = make_evaluated(tmp_path, make_rows(), eval_answers=8)
    levels = levels_of(trainer, make_rows())
    metrics = trainer.evaluate()
    assert metrics["eval_exact_match"] == sum(RIGHT) / 8
    for name in trainer.level_names:
        own = [right for right, level in zip(RIGHT, levels, strict=True) if level == name]
        assert metrics.get(f"eval_exact_match/{name}") == (sum(own) / len(own) if own else None)


def test_rows_are_read_at_the_level_they_name_if_training_reads_them_there(tmp_path, canned):
    levels = ["coarse", "fine"] * 4
    rows = [row | {"granularity": level} for row, level in zip(make_rows(), levels, strict=True)]
    metrics = make_evaluated(tmp_path, rows, eval_answers=8, level_from_rows=True).evaluate()
    for name in ("coarse", "fine"):
        own = [right for right, row in zip(RIGHT, rows, strict=True) if row["images"] and row["granularity"] == name]
        assert metrics[f"eval_exact_match/{name}"] == sum(own) / len(own)


def test_a_model_without_levels_and_rows_without_words_are_counted_right(tmp_path, canned):
    rows = make_rows()
    rows[0]["completion"][0]["content"][0]["text"] = "?!"
    plain = {"model": make_model(granularities=[]), "processor": make_processor(num_semantic_tokens=0)}
    weights = dict.fromkeys(("pixel_loss_weight", "semantic_loss_weight", "granularity_loss_weight"), 0.0)
    trainer = make_evaluated(tmp_path, rows, eval_answers=8, **weights, **plain)
    assert trainer.evaluate()["eval_exact_match"] == pytest.approx(sum(RIGHT[1:]) / 7)


def test_processes_share_evenly_spaced_rows(tmp_path):
    rows = Dataset.from_list([{"completion": [{"role": "assistant", "content": str(n)}]} for n in range(100)])
    parts = []
    for process in range(3):
        args = SimpleNamespace(eval_answers=10, process_index=process, world_size=3)
        parts.append([int(row["answer"]) for row in eval_answers._own_rows(rows, args)])
    assert sorted(sum(parts, [])) == [11 * number for number in range(10)] and [len(p) for p in parts] == [4, 3, 3]
    stream = rows.to_iterable_dataset()
    args = SimpleNamespace(eval_answers=10, process_index=0, world_size=3)
    assert [row["answer"] for row in eval_answers._own_rows(stream, args)] == ["0", "1", "2", "3"]


def test_nothing_is_answered_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_answers, "generate", lambda *args, **kwargs: pytest.fail("answered"))
    assert "eval_exact_match" not in make_evaluated(tmp_path, make_rows()).evaluate()


def test_sharded_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("granulon.train.trainer.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="eval_answers needs whole weights"):
        make_trainer(tmp_path, eval_answers=8)
