"""Other methods in the place of the aggregation, and their accuracy at a budget of tokens."""

import json

import pytest
import torch
from conftest import make_image, make_inputs, make_model, make_processor

from granulon.evaluation.analyses.budgets import OURS, accuracy_at_budgets, budgets_markdown, draw_budgets
from granulon.evaluation.analyses.run import main
from granulon.evaluation.token_reduction import METHODS, Reduction, fastv_answer, replaced
from granulon.hub.inference import encode, generate, question_about

GRID, WIDTH = (6, 6), 32
CHATS = [question_about(make_image(seed), f"what is it, {seed}?") for seed in range(3)]


def features_and_attention(images=2):
    torch.manual_seed(0)
    features = torch.randn(images, GRID[0] * GRID[1], WIDTH)
    return features, torch.randn(images, 36, 36).softmax(-1)


@pytest.mark.parametrize("kept", [1, 5, 12])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "smaller image"])
def test_a_method_makes_as_many_tokens_as_it_is_asked_for(method, kept):
    features, attention = features_and_attention()
    if method == "VisionZip" and kept == 1:
        kept = 2  # half of the tokens are dominant
    tokens, label = METHODS[method](features, attention, kept, GRID)
    assert tokens.shape == (2, kept, WIDTH) and label.shape == (2, 36)
    for row in label:
        assert set(row.tolist()) - {-1} == set(range(kept))  # every token has a patch
    alone, _ = METHODS[method](features[1:], attention[1:], kept, GRID)
    torch.testing.assert_close(alone[0], tokens[1])


@pytest.mark.parametrize("method", ["average pooling", "k-means", "ToMe"])
def test_a_method_that_merges_keeps_the_mean_of_all_patches(method):
    features, attention = features_and_attention()
    tokens, label = METHODS[method](features, attention, 9, GRID)
    share = torch.nn.functional.one_hot(label, 9).float().mean(1)
    torch.testing.assert_close((tokens * share.unsqueeze(-1)).sum(1), features.mean(1))


def test_a_pruned_image_shows_single_patches_where_they_lie():
    features, attention = features_and_attention()
    found = Reduction("random patches")(features, attention, 1, 5, GRID, 5)
    for image, tokens in enumerate(found.tokens):
        for slot, token in enumerate(tokens):
            patch = (features[image] == token).all(-1).nonzero().item()
            row, column = found.geometry[image, slot, :2]
            assert row == pytest.approx((2 * (patch // 6) + 1) / 6 - 1, abs=1e-6)
            assert column == pytest.approx((2 * (patch % 6) + 1) / 6 - 1, abs=1e-6)


def test_prumerge_adds_what_is_similar_by_its_attention():
    features, attention = features_and_attention(1)
    tokens, label = METHODS["PruMerge"](features, attention, 30, GRID)  # six patches are left, fewer than 32
    received, others = attention[0].sum(0), (label[0] < 0).nonzero().squeeze(-1)
    added = (received[others] / received[others].sum()) @ features[0, others]
    kept = (label[0] >= 0).nonzero().squeeze(-1)
    torch.testing.assert_close(tokens[0], features[0, kept] + added)


def test_the_model_is_as_before_after_a_replacement():
    model, processor = make_model(), make_processor()
    before = generate(model, processor, encode(model, processor, CHATS, "fine"), "semantic", max_new_tokens=6)[0]
    config = json.dumps(model.config.to_dict(), default=str)
    for method in (None, *METHODS):
        with replaced(model, processor, 1, 5, None if method == "smaller image" else method):
            prompt = encode(model, processor, CHATS, "fine")
            found = generate(model, processor, prompt, "semantic", max_new_tokens=6)[0]
            assert (found == before) == (method in (None, "smaller image"))
    with replaced(model, processor, 1, 17, "ToMe"):
        (row, *_) = encode(model, processor, CHATS, "fine").visual.describe("semantic")
        assert row["tokens"] == {"pixel": 0, "semantic": 17}
    assert json.dumps(model.config.to_dict(), default=str) == config
    assert (
        generate(model, processor, encode(model, processor, CHATS, "fine"), "semantic", max_new_tokens=6)[0] == before
    )


@pytest.mark.parametrize("decoder", ["qwen2", "llama", "qwen3"])
def test_fastv_that_keeps_all_tokens_answers_as_the_pixel_view(decoder, monkeypatch):
    monkeypatch.setattr("granulon.evaluation.token_reduction.FASTV_LAYER", 1)  # of two layers
    model, processor = make_model(decoder=decoder), make_processor()
    inputs = make_inputs(processor, ["what is it?"], [[make_image(0), make_image(1)]], visual_view="pixel")
    expected = model.generate(**inputs, visual_view="pixel", granularity=0, max_new_tokens=8, do_sample=False)
    expected = expected[0, inputs["input_ids"].shape[1] :].tolist()
    assert fastv_answer(model, dict(inputs) | {"granularity": 0}, 72, 8, (258,)) == expected
    fewer = fastv_answer(model, dict(inputs) | {"granularity": 0}, 4, 8)
    assert len(fewer) == 8 and fewer != expected


def test_fastv_drops_image_tokens_after_its_first_layers(monkeypatch):
    model, processor = make_model(), make_processor()
    inputs = make_inputs(processor, ["what is it?"], [[make_image(0)]], visual_view="pixel")
    lengths = []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    monkeypatch.setattr("granulon.evaluation.token_reduction.FASTV_LAYER", 1)
    fastv_answer(model, dict(inputs), 7, 1)
    total = inputs["input_ids"].shape[1]
    assert lengths[-2:] == [total, total - 36 + 7]


@pytest.fixture(scope="module")
def report():
    model, processor = make_model(), make_processor()
    rows = [{"image": make_image(seed), "question": f"what, {seed}?", "answer": "a"} for seed in range(4)]
    for row in rows[:2]:  # right at the fine level
        prompt = encode(model, processor, [question_about(row["image"], row["question"])], "fine")
        row["answer"] = generate(model, processor, prompt, "semantic", max_new_tokens=16)[0][0].upper() + "."
    return accuracy_at_budgets(model, processor, rows, budgets=(2, 9), timed_rows=1)


def test_every_method_is_measured_at_every_budget(report):
    entries = {(entry["method"], entry["level"], entry["budget"]): entry for entry in report["entries"]}
    for budget in (2, 9):
        for method in (*METHODS, "FastV"):
            entry = entries[method, None, budget]
            assert entry["tokens"] == pytest.approx(budget if method != "smaller image" else {2: 2, 9: 9}[budget])
            for median, low, high in (entry["first_token_ms"], entry["tokens_per_second"]):
                assert 0 < low <= median <= high
    assert entries[OURS, "fine", None]["accuracy"][0] >= 0.5 and entries[OURS, "fine", None]["tokens"] == 5
    assert entries[OURS, "pixel", None]["tokens"] == 36 and entries[OURS, "full", None]["tokens"] > 36
    best = entries[OURS, "best of each question", None]["accuracy"][0]
    assert best >= max(entries[OURS, level, None]["accuracy"][0] for level in ("coarse", "fine"))


def test_the_table_and_the_picture_show_every_entry(report):
    assert budgets_markdown(report).count("\n| ") == len(report["entries"]) + 2
    figure = draw_budgets(report)
    assert len(figure.axes) == 2


def test_questions_without_answers_are_refused(tmp_path, capsys):
    model, processor = make_model(), make_processor()
    with pytest.raises(ValueError, match="no row has an answer"):
        accuracy_at_budgets(model, processor, [{"image": make_image(0), "question": "what?", "answer": None}])
    with pytest.raises(ValueError, match="no levels of granularity"):
        accuracy_at_budgets(make_model(granularities=[]), processor, [])
    with pytest.raises(SystemExit):
        main(["budgets", "--model", str(tmp_path), "--rows", "none.json", "--output", str(tmp_path)])
