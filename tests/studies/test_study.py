"""The study: arms that differ in their image tokens alone, answers like the model's own, figures with intervals."""

import re
from collections import Counter
from dataclasses import replace
from functools import partial
from random import Random

import numpy as np
import pytest
import torch
from sources import text_source, vision_source

from granulon.hub.assemble import assemble
from granulon.hub.inference import load_model, question_about
from granulon.train.data.cutouts import compose, patch_texts, questions
from modeling_granulon.image_tokens import FULL, PIXEL, SEMANTIC
from studies import run as study
from studies import training
from studies.arms import (
    BUDGET_ARMS,
    BUDGETS,
    PART_ARMS,
    PIXEL_ARMS,
    SMALLER,
    SOURCES,
    Arm,
    Questions,
    aggregate,
    answer_log_probs,
    ask,
    embed,
)
from studies.report import comparisons_table, mean_over_seeds, mean_with_interval, statistics
from studies.training import LEVELS, cached, draw_arms, evaluate, label_rows, on_grid

ALL_ARMS = (*BUDGET_ARMS, *PART_ARMS, *PIXEL_ARMS)


@pytest.fixture
def base(tmp_path, monkeypatch, stamps):
    """A small random model of the study's families, with 16 x 16 patches."""
    vision = vision_source(tmp_path / "vision", "dinov2")
    text = text_source(tmp_path / "text", "llama", tie=True)
    monkeypatch.setattr(training, "assemble", partial(assemble, image_size=64))
    monkeypatch.setattr(training, "fetch_part", {"dinov2-small": vision, "smollm2-135m-instruct": text}.get)
    return training.assembled(tmp_path / "study")


@pytest.fixture
def scenes(base):
    return training.scenes_of("check", 6, base)


@pytest.fixture
def model_and_processor(base):
    model = load_model(base)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.model.multi_modal_projector.parameters():  # zeros and ones would hide what is left out
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model, training.load_processor(base, model.config)


def test_arms_of_one_budget_have_as_many_tokens_and_no_image_depends_on_the_batch(scenes, model_and_processor):
    model, _ = model_and_processor
    for arm in ALL_ARMS:
        embeds = embed(model, arm, scenes["seen"])
        pixels = 256 if arm.view != SEMANTIC else 0
        own = 0 if arm.view == PIXEL else {5: 4, 10: 9, 20: 20}[arm.tokens] if arm.source == SMALLER else arm.tokens
        assert embeds.shape[:2] == (6, pixels + own), arm.name
        alone = embed(model, arm, scenes["seen"].rows(slice(3, 4)))
        torch.testing.assert_close(alone[0], embeds[3], atol=1e-4, rtol=1e-4)
    assert len({arm.name for arm in ALL_ARMS}) == len(ALL_ARMS)


def test_variants_of_the_aggregation_differ_from_it(scenes):
    sharp = torch.rand(scenes["seen"].relation_SNC.shape, generator=torch.Generator().manual_seed(0)) ** 8
    seen = replace(scenes["seen"], relation_SNC=sharp)  # a random tower attends to everything alike
    whole = aggregate(Arm("AdaTA"), seen).tokens
    for arm in PART_ARMS:
        assert not torch.allclose(aggregate(arm, seen).tokens, whole, atol=1e-3), arm.name


@pytest.mark.parametrize("view", [SEMANTIC, PIXEL, FULL])
def test_cached_features_and_packed_questions_give_the_likelihoods_of_single_prompts(
    view, scenes, model_and_processor
):
    """Through processor and model, from pixels, one question at a time."""
    model, processor = model_and_processor
    arm, seen = replace(PIXEL_ARMS[1], view=view), scenes["seen"].rows(slice(2))
    packed = Questions.of(processor, scenes["questions"][:2])
    with torch.no_grad():
        log_BL, _ = answer_log_probs(model, packed, embed(model, arm, seen))
    numbers, row = [], 0
    while len(numbers) < 2:  # the scenes of `scenes_of`
        name = f"study check {row}"
        numbers += [row] if len(questions(compose(name), name)) >= training.ASKED else []
        row += 1
    for scene, number in enumerate(numbers):
        picture = compose(f"study check {number}").picture
        for place, question in enumerate(scenes["questions"][scene]):
            chat = question_about(picture, question.text)
            prompt = processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            answer = torch.tensor(processor.tokenizer(f" {question.answer}", add_special_tokens=False)["input_ids"])
            answer = torch.cat([answer, torch.tensor([processor.tokenizer.eos_token_id])])[None]
            prompt["input_ids"] = torch.cat([prompt["input_ids"], answer], dim=1)
            prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
            with torch.no_grad():
                logits = model(**prompt, granularity="medium", visual_view=view).logits[0, -answer.shape[1] - 1 : -1]
            wanted = logits.log_softmax(-1).gather(-1, answer[0, :, None])[:, 0]
            torch.testing.assert_close(log_BL[scene][packed.segment_BL[scene] == place], wanted, atol=2e-2, rtol=1e-2)


def test_a_question_sees_the_image_and_no_other_question(scenes, model_and_processor):
    model, processor = model_and_processor
    packed = Questions.of(processor, scenes["questions"])
    image = embed(model, Arm("AdaTA"), scenes["seen"])
    changed = replace(packed, ids_BT=torch.where(packed.segment_BT == 1, 5, packed.ids_BT))
    with torch.no_grad():
        before, after, other = (
            answer_log_probs(model, *given)[0]
            for given in ((packed, image), (changed, image), (packed, image.flip(0)))
        )
    rest = packed.segment_BL != 1
    torch.testing.assert_close(before[rest], after[rest], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[~rest], after[~rest], atol=1e-3)
    assert not torch.allclose(before, other, atol=1e-3)


def test_an_answer_is_right_if_greedy_decoding_gives_it(scenes, model_and_processor):
    model, processor = model_and_processor
    arm, asked = Arm("AdaTA"), scenes["questions"][:1]
    packed, image = Questions.of(processor, asked), embed(model, Arm("AdaTA"), scenes["seen"].rows(slice(1)))
    with torch.no_grad():
        hit_BL = answer_log_probs(model, packed, image)[1]
        right = ask(model, (arm,), scenes["seen"].rows(slice(1)), packed)[0][0, 0]
    for number in range(training.ASKED):
        assert right[number] == hit_BL[0][packed.segment_BL[0] == number].all()
    model.lm_head.weight.data.zero_()  # all tokens alike: the first one is the likeliest
    first = replace(packed, ids_BT=torch.where(packed.segment_BT >= 0, 0, packed.ids_BT))
    assert ask(model, (arm,), scenes["seen"].rows(slice(1)), first)[0].all()


def test_shifting_asks_about_the_next_image(scenes, model_and_processor):
    arms, given = (Arm("ToMe", 5),), {**scenes}
    moved = {**given, "seen": given["seen"].rows(torch.arange(6).roll(-1))}
    found, wanted = (
        evaluate(*model_and_processor, one, arms, shift=shift, batch=4) for one, shift in ((given, 1), (moved, 0))
    )
    assert found["right"].shape == (1, 6, training.ASKED)
    torch.testing.assert_close(found["nll"], wanted["nll"], atol=1e-3, rtol=1e-3)


def test_sources_and_budgets_are_trained_equally_often():
    random = Random(0)
    drawn = [draw_arms(random) for _ in range(20_000)]
    semantic = [arm for arm in drawn if arm.view == SEMANTIC]
    assert len(semantic) / len(drawn) == pytest.approx(0.8, abs=0.02)
    sources = Counter(arm.source.split(",")[0] for arm in semantic)
    assert set(sources) == set(SOURCES)
    assert max(sources.values()) < 1.15 * min(sources.values())
    budgets = Counter(arm.tokens for arm in semantic)
    assert max(budgets.values()) < 1.1 * min(budgets.values())
    assert {arm.name for arm in PART_ARMS} < {arm.name for arm in semantic}


def test_a_patch_of_the_whole_image_has_the_token_of_the_small_image_that_lies_there():
    label = on_grid(torch.arange(4).view(1, 2, 2), (6, 6)).view(6, 6)
    assert [label[0, 0], label[2, 5], label[3, 0], label[5, 5]] == [0, 1, 2, 3]
    assert torch.equal(on_grid(torch.arange(36).view(1, 6, 6), (6, 6))[0], torch.arange(36))


def test_a_cached_result_is_made_once_and_never_half_written(tmp_path):
    made = []
    for _ in range(2):
        assert cached(tmp_path / "x" / "one.pt", lambda: made.append(1) or {"value": 3}) == {"value": 3}
    assert made == [1]
    with pytest.raises(KeyError):
        cached(tmp_path / "x" / "two.pt", lambda: {}["missing"])
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["one.pt"]


def test_labels_follow_the_likelihood_or_the_kind_of_a_question(stamps):
    asked = [questions(compose(f"study x {number}"), str(number))[:2] for number in range(12)]
    nll = torch.rand(3, 12, 2, generator=torch.Generator().manual_seed(0))
    measured, template = (label_rows(source, asked, nll) for source in ("measured", "template"))
    assert [row["level"] for row in measured] == [LEVELS[n] for n in nll.argmin(0).flatten()]
    assert [row["level"] for row in template] == [question.level for own in asked for question in own]
    assert Counter(row["split"] for row in template) == {"train": 22, "validation": 2}


def test_an_exported_model_answers_as_the_trained_one(base, scenes, tmp_path):
    start = load_model(base)
    model, processor = training.load_start(base, start.model.multi_modal_projector.state_dict(), seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    trained, untrained = (evaluate(one, processor, scenes, PIXEL_ARMS)["nll"] for one in (model, start))
    training.write_model(model, processor, tmp_path / "model")
    exported = evaluate(load_model(tmp_path / "model"), processor, scenes, PIXEL_ARMS)["nll"]
    torch.testing.assert_close(exported, trained, atol=1e-2, rtol=1e-2)
    assert not torch.allclose(trained, untrained, atol=0.1)


def test_patches_of_test_scenes_are_named(stamps):
    assert len(patch_texts(compose("study test 0"))) == 256


def test_intervals_take_scenes_and_seeds_into_account():
    random = np.random.default_rng(0)
    right = (random.random((5, 200, 12)) < 0.7).astype(int)
    rows = statistics(right)
    assert rows.shape == (200, 6)
    assert np.isclose(mean_over_seeds(rows.sum(0, keepdims=True))[0], right.mean())

    def width(values):
        low, high = map(float, re.findall(r"\[(.*), (.*)\]", mean_with_interval(values))[0])
        return high - low

    uneven = (random.random((5, 200, 12)) < np.array([0.4, 0.5, 0.6, 0.7, 0.8])[:, None, None]).astype(int)
    assert width(uneven) > 2 * width(right)


def test_comparisons_state_difference_interval_and_p_corrected_in_their_part():
    random = np.random.default_rng(0)
    theirs = (random.random((5, 200, 12)) < 0.6).astype(int)
    ours = np.maximum(theirs, random.random((5, 200, 12)) < 0.2)
    text = comparisons_table(
        [("a", "better", ours, theirs), ("a", "same", theirs, theirs), ("b", "alone", ours, theirs)]
    )
    better, same, alone = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if re.match(r"\| [ab] \| ", line)
    )
    assert re.fullmatch(r"\+\d+\.\d \[\+\d+\.\d, \+\d+\.\d\]", better[2])
    assert better[5:] == ["5 / 0 of 5", "yes"] and same[2:5] == ["+0.0 [+0.0, +0.0]", "1.0000", "1.0000"]
    assert float(better[4]) == pytest.approx(2 * float(better[3]), abs=1.1e-4) and alone[3] == alone[4]


@pytest.mark.slow
def test_the_quick_study_runs_to_its_report_and_a_rerun_repeats_nothing(tmp_path, base):
    options = ["--quick", "--seeds", "2", "--workers", "1", "--output", str(tmp_path / "study")]
    study.main(options)
    report = (tmp_path / "study" / "results.md").read_text()
    for part in "abcde":
        assert re.search(rf"^\| {part} \| .* \[[-+]\d", report, re.M), f"part {part} has no comparison with interval"
    assert all(f"| {source} |" in report for source in SOURCES) and all(f"{n} tokens" in report for n in BUDGETS)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*.pt")}
    (tmp_path / "study" / "test-32.pt").unlink()
    study.main([*options, "--export", str(tmp_path / "model")])
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*.pt")}
    assert {path.name for path in made if made[path] != again[path]} == {"test-32.pt"}
    assert load_model(tmp_path / "model").config.granularity_names == list(LEVELS)
