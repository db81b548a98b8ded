"""`granulon-train-controller` teaches the model's own controller, changes nothing else, and reports it honestly."""

import json
import sys

import pytest
import torch
from conftest import make_image, make_model, make_processor
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from granulon.hub.files import write_jsonl
from granulon.train.controller.fit import (
    PICTURE,
    PREFIX,
    REPORT,
    Labelled,
    bag_of_words,
    controller_logits,
    main,
    question_states,
    tables,
    train_controller,
)
from granulon.train.controller.measure import measure_rows

WORDS = {"coarse": ("whole scene", "place", "weather"), "fine": ("tiny mark", "small text", "last digit")}
SETTINGS = {"epochs": 60, "lr": 1e-2}


def make_corpus(test="test_questions"):
    """Questions whose words tell the level; of every ten the first is for validation and the second for a test."""
    rows = []
    for level, words in WORDS.items():
        for number in range(40):
            split = {0: "validation", 1: test}.get(number % 10, "train")
            question = f"{number}: what about the {words[number % 3]}?"
            rows.append({"question": question, "level": level, "split": split, "phrasing": f"{level} {number % 3}"})
    return rows


@pytest.fixture
def checkpoint(tmp_path):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "granulon_manifest.json").write_text("{}")
    (tmp_path / "model" / "optimizer.pt").write_bytes(b"of a run")
    return tmp_path / "model"


@pytest.fixture
def command(checkpoint, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "corpus.jsonl", make_corpus())

    def run(*more):
        arguments = ["--model", checkpoint, "--corpus", tmp_path / "corpus.jsonl", "--output", tmp_path / "trained"]
        arguments += ["--epochs", 60, "--learning_rate", 1e-2, *more]
        monkeypatch.setattr(sys, "argv", ["granulon-train-controller", *map(str, arguments)])
        main()
        return tmp_path / "trained"

    return run


@pytest.mark.parametrize("decoder, layers", [("qwen2", 1), ("llama", 1), ("llama", 2)])
def test_the_cached_states_give_the_logits_that_the_model_gives_when_asked(decoder, layers):
    model, processor = make_model(decoder=decoder, controller_layers=layers), make_processor()
    questions = ["What is the tiny mark?", "Where?", "  What, <image> and <|im_end|>, is the whole scene about?  "]
    states_QE = question_states(model, processor, questions, batch_size=2)
    cached_QG = controller_logits(model.model.granularity_controller, states_QE)
    for question, logits_G in zip(questions, cached_QG, strict=True):
        content = [{"type": "image", "image": make_image(0)}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        asked_G = model.explain(**inputs).granularity_logits[0]
        torch.testing.assert_close(logits_G, asked_G.detach(), rtol=1e-5, atol=1e-5)


def test_a_separable_corpus_is_learned_and_held_out_questions_are_read_right():
    model, processor = make_model(), make_processor()
    report = train_controller(model, processor, make_corpus(), **SETTINGS)
    split = report["splits"]["test_questions"]
    assert split["controller"]["accuracy"][0] > 0.95 and split["bag_of_words"]["accuracy"][0] > 0.95
    assert split["chance"] == split["commonest"] == 0.5 and split["rows"] == 8
    assert split["controller"]["groups"] == 6, "the bootstrap draws phrasings"
    assert report["rows"] == {"train": 64, "validation": 8, "test_questions": 8}
    losses = [entry["validation_loss"] for entry in report["history"]]
    assert report["best_epoch"] == 1 + losses.index(min(losses))


def test_the_report_names_the_models_that_annotated():
    annotated = {"source": "annotated", "annotator": {"model": "meta-llama/Llama-3.3-70B"}}
    template = {"source": "template", "annotator": None}
    rows = [row | (annotated if row["level"] == "fine" else template) for row in make_corpus()]
    assert train_controller(make_model(), make_processor(), rows, epochs=1)["annotators"] == [
        "meta-llama/Llama-3.3-70B"
    ]


def test_kinds_are_the_groups_of_a_split_that_holds_out_kinds():
    rows = [row | {"kind": f"kind {row['phrasing'][-1]}"} for row in make_corpus("test_kinds")]
    report = train_controller(make_model(), make_processor(), rows, epochs=1)
    assert report["splits"]["test_kinds"]["controller"]["groups"] == 3


def test_only_the_controller_changes():
    model, processor = make_model(), make_processor()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    train_controller(model, processor, make_corpus(), epochs=2)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if name.startswith(PREFIX)}


def test_the_same_seed_gives_the_same_controller_and_leaves_the_random_state_alone():
    weights = []
    for seed in (0, 0, 1):
        model, processor = make_model(), make_processor()
        torch.manual_seed(3)
        train_controller(model, processor, make_corpus(), epochs=2, seed=seed)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))
        weights.append(model.model.granularity_controller.projection.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_soft_labels_are_learned_as_probabilities_and_hard_ones_as_levels():
    rows = [
        {"question": f"{number}?", "level_probs": {"coarse": 0.7, "fine": 0.3}, "split": "train"}
        for number in range(8)
    ]
    model, processor = make_model(), make_processor()
    for soft, expected in ((True, 0.7), (False, 1.0)):
        train_controller(model, processor, rows, soft=soft, **SETTINGS | {"epochs": 150})
        states_QE = question_states(model, processor, ["3?"])
        probs_QG = controller_logits(model.model.granularity_controller, states_QE).softmax(-1)
        assert probs_QG[0, 0].item() == pytest.approx(expected, abs=0.03)


def test_training_stops_where_validation_no_longer_improves():
    rows = make_corpus()
    for row in rows:  # nothing to be learned for validation
        if row["split"] == "validation":
            row["level"] = "fine" if row["level"] == "coarse" else "coarse"
    report = train_controller(make_model(), make_processor(), rows, patience=3, **SETTINGS)
    assert len(report["history"]) == report["best_epoch"] + 3 < 60


def test_the_bag_of_words_learns_probabilities_where_labels_are_probabilities():
    rows = [{"question": f"{number}?", "level": "fine", "split": "train"} for number in range(20)]
    rows = [row | {"level_probs": {"coarse": 0.3, "fine": 0.7}} for row in rows]
    words_QG = bag_of_words(Labelled.of(rows, ["coarse", "fine"], soft=True))
    assert words_QG[:, 1].tolist() == pytest.approx([0.7] * 20, abs=0.02)
    torch.testing.assert_close(words_QG.sum(-1), torch.ones(20))


def test_words_that_training_never_saw_leave_the_bag_of_words_at_the_prior():
    rows = [{"question": f"{word} here?", "level": "fine", "split": "train"} for word in ("a", "b", "c")]
    rows += [{"question": "d there", "level": "fine", "split": "train"}]
    rows += [{"question": "elsewhere", "level": "coarse", "split": "test"}]
    words_QG = bag_of_words(Labelled.of([r | {"level_probs": {"fine": 1, "coarse": 0}} for r in rows],
                                        ["coarse", "fine"], soft=False))  # fmt: skip
    assert words_QG[-1, 1] > 0.5


def test_measured_rows_also_tell_what_the_answers_lose():
    model, processor = make_model(), make_processor()
    rows = [
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"what {number}?"}]}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": "yes" * (1 + number % 3)}]}],
            "images": [make_image(number)],
            "split": ("train", "test_questions")[number % 2],
        }
        for number in range(8)
    ]
    report = train_controller(model, processor, list(measure_rows(model, processor, rows)), epochs=2)
    loss = report["splits"]["test_questions"]["answer_loss"]
    assert loss["oracle"][0] <= loss["fixed"][loss["best_fixed"]][0]
    assert loss["oracle"][0] <= loss["chosen"][0]
    assert loss["rows"] == 4
    shown = tables(report)
    assert "chosen by the controller" in shown and f"chosen minus best fixed ({loss['best_fixed']})" in shown


def test_the_command_leaves_the_checkpoint_with_another_controller_and_nothing_else_changed(command, checkpoint):
    output = command()
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, output))
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert before.keys() == after.keys() and changed == {name for name in before if name.startswith(PREFIX)}
    names = {file.name for file in checkpoint.iterdir()} - {"optimizer.pt"} | {REPORT, PICTURE}
    assert {file.name for file in output.iterdir()} == names
    assert json.loads((output / REPORT).read_text())["splits"]["test_questions"]["controller"]["accuracy"][0] > 0.9
    record = json.loads((output / "granulon_manifest.json").read_text())["training"][-1]
    assert record["stage"] == "controller" and record["rows"] and record["annotators"] == []
    assert record["versions"]["torch"]
    assert Image.open(output / PICTURE).width > 300
    model = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True)
    asked = [row for row in make_corpus() if row["split"] == "test_questions"]
    states_QE = question_states(model, make_processor(), [row["question"] for row in asked])
    levels = controller_logits(model.model.granularity_controller, states_QE).argmax(-1).tolist()
    assert levels == [list(WORDS).index(row["level"]) for row in asked]


def test_the_command_prints_every_score_beside_chance_and_a_bag_of_words(command, capsys):
    command()
    printed = capsys.readouterr().out
    for name in ("controller", "bag of words", "chance", "commonest"):
        assert "| test_questions | 8 " in printed and f"| {name} |" in printed
    assert "rows {" in printed and "wrote" in printed


def test_the_seed_corpus_is_there_without_a_file(checkpoint, tmp_path, monkeypatch):
    levels = [{"name": name, "stride": 1, "clusters": 3, "keep": 2} for name in ("coarse", "medium", "fine")]
    model = make_model(granularities=levels)
    model.save_pretrained(checkpoint)
    arguments = ["--model", checkpoint, "--output", tmp_path / "trained", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["granulon-train-controller", *map(str, arguments)])
    main()
    splits = json.loads((tmp_path / "trained" / REPORT).read_text())["splits"]
    assert set(splits) == {"test_questions", "test_phrasings", "test_kinds"}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda rows: [row | {"level": "huge"} for row in rows], r"\['huge'\]; the model has \['coarse', 'fine'\]"),
        (lambda rows: [row for row in rows if row["split"] != "train"], "no rows of the split 'train'"),
    ],
)
def test_a_corpus_that_does_not_fit_is_refused_and_leaves_nothing(command, tmp_path, damage, message):
    write_jsonl(tmp_path / "corpus.jsonl", damage(make_corpus()))
    with pytest.raises(SystemExit, match=message):
        command()
    assert not (tmp_path / "trained").exists()


def test_an_existing_output_is_not_overwritten(command, tmp_path):
    (tmp_path / "trained").mkdir()
    with pytest.raises(SystemExit, match="exists already"):
        command()


@pytest.mark.parametrize("overrides", [{"controller": "random"}, {"granularities": []}])
def test_a_model_without_a_controller_that_learns_is_refused(overrides):
    with pytest.raises(ValueError, match="no learned controller"):
        train_controller(make_model(**overrides), make_processor(), make_corpus())


def test_a_loss_that_is_not_finite_stops_and_leaves_the_model_as_it_was():
    model, processor = make_model(), make_processor()
    model.model.language_model.embed_tokens.weight.data[5:100] = float("nan")
    before = model.model.granularity_controller.projection.weight.clone()
    with pytest.raises(FloatingPointError, match="not finite"):
        train_controller(model, processor, make_corpus(), epochs=1)
    assert torch.equal(model.model.granularity_controller.projection.weight, before)
