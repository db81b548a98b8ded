"""The analyses compare the right states, count what the samples count, and say clearly what they cannot use."""

import json

import numpy as np
import pytest
import torch
from conftest import count_calls, make_image, make_model
from PIL import Image

from granulon.evaluation.analyses.alignment import (
    DEFINITIONS,
    alignment,
    alignment_markdown,
    compare,
    draw_alignment,
    mean_states,
    prompts_with_answers,
)
from granulon.evaluation.analyses.calibration import calibration, calibration_markdown, draw_calibration, reliability
from granulon.evaluation.analyses.files import finished_runs, read_questions, write_analysis
from granulon.evaluation.analyses.levels import chosen_levels, draw_levels, levels_markdown, question_types
from granulon.evaluation.analyses.run import main
from granulon.evaluation.analyses.tokens import accuracy_against_tokens, draw_tokens, tokens_markdown
from granulon.hub.assemble import assemble_tiny
from granulon.train.controller.level_scores import scores

QUESTIONS = ("Red?", "What is in the far left corner of it?", "How many of these are there?", "Is it day?")


def make_rows(count=4, answers=True):
    return [
        {
            "image": make_image(number // 2),
            "question": QUESTIONS[number % len(QUESTIONS)],
            "answer": ["blue", "a boat"][number % 2] if answers else None,
        }
        for number in range(count)
    ]


def compared(images, *groups):
    """The cosines of two equal layers, whose groups are lists of vectors: pixel, semantic, question, answer."""
    layers = (np.stack([np.asarray(group, float)] * 2, 1) for group in groups)
    states = dict(zip(("pixel", "semantic", "question", "answer"), layers, strict=True))
    return compare(states | {"projector": states["pixel"]}, images, DEFINITIONS["parts"])


def cosine_of(pairs, text, image, measure="cosine"):
    return next(pair[measure][0][0] for pair in pairs if (pair["text"], pair["image"]) == (text, image))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint's folder, and beside it four rows about two images."""
    folder = assemble_tiny(tmp_path_factory.mktemp("tiny") / "model")
    rows = make_rows()
    for number, row in enumerate(rows):
        path = folder.parent / f"{number // 2}.png"
        row["image"].save(path)
        row["image"] = path.name
    (folder.parent / "rows.json").write_text(json.dumps(rows))
    return folder


# Alignment


def test_identical_states_have_cosine_one_and_orthogonal_ones_zero():
    one, other = [[1.0, 0, 0], [0, 2.0, 0]], [[0, 0, 3.0], [0, 0, 1.0]]
    pairs = compared(["a", "b"], one, other, one, other)
    assert cosine_of(pairs, "question", "pixel") == pytest.approx(1)
    assert cosine_of(pairs, "question", "semantic") == pytest.approx(0)
    assert cosine_of(pairs, "answer", "semantic") == pytest.approx(1)
    assert cosine_of(pairs, "question", "pixel", "cosine_other_image") == pytest.approx(0)


def test_centring_takes_away_a_direction_that_all_states_share():
    random = np.random.default_rng(0)
    common = 100 * np.ones(64)
    groups = [common + random.normal(size=(40, 64)) for _ in range(4)]
    groups[2] = groups[0] - 50  # the question says what the pixels say, and the answer something else
    pairs = compared([str(number) for number in range(40)], *groups)
    assert cosine_of(pairs, "answer", "pixel") > 0.99
    assert abs(cosine_of(pairs, "answer", "pixel", "centred")) < 0.1
    assert cosine_of(pairs, "question", "pixel", "centred") == pytest.approx(1)
    assert abs(cosine_of(pairs, "question", "pixel", "centred_other_image")) < 0.1


def test_a_state_that_never_changes_has_no_centred_cosine():
    same, other = np.ones((4, 3)), np.eye(4)[:, :3] + 1
    pairs = compared(list("abcd"), other, other, same, other)
    assert np.isnan(cosine_of(pairs, "question", "pixel", "centred"))
    assert np.isfinite(cosine_of(pairs, "question", "pixel"))


def test_intervals_come_from_images_and_not_from_questions():
    random = np.random.default_rng(0)
    one, other = random.normal(size=(12, 8)), random.normal(size=(12, 8))
    groups, images = (one, one, other, other), [str(number) for number in range(12)]
    few = compared(images, *groups)[0]["cosine"][0]
    repeated = (np.repeat(group, 10, 0) for group in groups)
    many = compared([name for name in images for _ in range(10)], *repeated)[0]["cosine"][0]
    assert many == pytest.approx(few)


def test_question_and_answer_are_found_in_prompts_of_any_length(processor):
    rows = make_rows()
    inputs, texts_B2T = prompts_with_answers(processor, rows, [row["image"] for row in rows])
    assert len(set(inputs["attention_mask"].sum(1).tolist())) > 1, "some rows are padded"
    for row, ids_T, texts_2T in zip(rows, inputs["input_ids"], texts_B2T):
        found = [processor.tokenizer.decode(ids_T[mask_T]) for mask_T in texts_2T]
        assert found == [row["question"], row["answer"]]


def test_states_at_the_input_are_those_of_the_projector_and_of_the_words(model, processor):
    (row,) = make_rows(1)
    states = mean_states(model, processor, [row], granularity="fine")[0]
    pixels = processor.image_processor(row["image"], return_tensors="pt")["pixel_values"]
    seen = model.explain(pixels, granularity="fine")
    tokens_RE, kept = seen.image_hidden_states[0], int(seen.semantic_mask.sum())
    assert 0 < kept <= 5
    embeddings = model.get_input_embeddings()
    wanted = [tokens_RE[:36].mean(0), tokens_RE[len(tokens_RE) - kept :].mean(0)]
    for text in (row["question"], row["answer"]):
        wanted.append(embeddings(torch.tensor(processor.tokenizer(text)["input_ids"])).mean(0))
    for name, wanted_E in zip(("pixel", "semantic", "question", "answer"), wanted, strict=True):
        assert states[name].shape == (1, 1 + model.config.text_config.num_hidden_layers, 32)
        assert np.allclose(states[name][0, 0], wanted_E.detach().numpy(), atol=1e-5), name


def test_states_come_from_images_that_were_encoded_once(model, processor):
    calls = count_calls(model)
    mean_states(model, processor, make_rows(), granularity="coarse", batch_size=4)
    assert calls == {"vision_tower": 1, "granularity_controller": 1, "aggregation": 1}


def test_a_sample_in_a_padded_batch_is_the_sample_alone(model, processor):
    rows = make_rows()
    together, images = mean_states(model, processor, rows, batch_size=4)
    alone, _ = mean_states(model, processor, rows, batch_size=1)
    assert all(np.allclose(together[name], alone[name], atol=1e-4) for name in together)
    assert images[0] == images[1] != images[2] == images[3]


def test_the_last_layer_is_what_the_head_reads(model, processor):
    (row,) = make_rows(1, answers=False)
    states = mean_states(model, processor, [row])[0]
    inputs, texts_B2T = prompts_with_answers(processor, [row], [row["image"]])
    with torch.no_grad():
        last_TE = model.model(**inputs).last_hidden_state[0]
    assert np.allclose(states["question"][0, -1], last_TE[texts_B2T[0, 0]].mean(0).numpy(), atol=1e-4)
    assert np.isnan(states["answer"]).all()


def test_the_whole_alignment_and_its_picture(model, processor, tmp_path):
    report = alignment(model, processor, make_rows(8))
    assert report["layers"] == 2 and report["samples"] == 8 and report["images"] == 4
    assert [pair["samples"] for pair in report["pairs"]] == [8] * 7
    assert all(-1.001 <= entry[0] <= 1.001 for pair in report["pairs"] for entry in pair["cosine"])
    projector = next(pair for pair in report["pairs"] if pair["image"] == "projector")
    assert projector["cosine"][0] == pytest.approx(report["pairs"][0]["cosine"][0])
    layers_mean = np.mean([entry[0] for entry in report["pairs"][0]["cosine"][1:-1]])
    assert report["pairs"][0]["cosine"][-1][0] == pytest.approx(layers_mean)
    files = write_analysis(tmp_path, "alignment", report, alignment_markdown(report), draw_alignment(report))
    assert [file.suffix for file in files] == [".json", ".md", ".png", ".pdf"]
    assert json.loads(files[0].read_text())["pairs"][0]["text"] == "question"
    assert "question × semantic" in files[1].read_text()
    assert sorted(tmp_path.iterdir()) == sorted(files), "nothing half-written stays"


def test_the_authors_definition_compares_whole_prompts_with_whole_prompts_of_the_answer(model, processor):
    rows = [row | {"answer": answer} for row, answer in zip(make_rows(4), ("a boat", "blue", "two of them", "yes"))]
    report = alignment(model, processor, [*rows, rows[0] | {"answer": None}], definition="authors", batch_size=3)
    cosines = []
    for row in rows:  # alone, without padding, by the public interface
        image = [{"type": "image", "image": row["image"]}, {"type": "text", "text": row["question"]}]
        means = []
        for content in (image, [{"type": "text", "text": row["answer"]}]):
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            )  # fmt: skip
            with torch.no_grad():
                states = model(**inputs, output_hidden_states=True).hidden_states
                seen_T = torch.ones(states[0].shape[1], dtype=torch.bool)
                if "pixel_values" in inputs:  # slots that the chosen level leaves empty are not read
                    slots_T = inputs["input_ids"][0] == model.config.image_token_id
                    kept = model.explain(**inputs).describe("full")[0]["tokens"]["semantic"]
                    slots = slots_T.nonzero().flatten()
                    seen_T[slots[36 : len(slots) - kept]] = False
            means.append([layer[0, seen_T].mean(0) for layer in states[1:]])
        cosines.append([torch.cosine_similarity(one, other, dim=0).item() for one, other in zip(*means, strict=True)])
    (pair,) = report["pairs"]
    assert (pair["text"], pair["image"], report["samples"]) == ("answer alone", "prompt", 4)
    assert [entry[0] for entry in pair["cosine"][1:-1]] == pytest.approx(np.mean(cosines, 0), abs=1e-4)
    assert pair["cosine"][-1][0] == pytest.approx(np.mean(cosines), abs=1e-4)
    assert "| mean of 1 to 2 |" in alignment_markdown(report) and len(draw_alignment(report).axes) == 4
    with pytest.raises(ValueError, match="samples with answers with each other and needs at least two, found 0"):
        alignment(model, processor, make_rows(4, answers=False), definition="authors")


def test_without_answers_or_levels_there_are_fewer_pairs(processor):
    plain, processor.num_semantic_tokens = make_model(granularities=[]), 0
    report = alignment(plain, processor, make_rows(4, answers=False))
    assert [(pair["text"], pair["image"]) for pair in report["pairs"]] == [
        ("question", "pixel"),
        ("question", "projector"),
    ]


def test_alignment_needs_two_samples_of_two_images(model, processor):
    with pytest.raises(ValueError, match="needs at least two, found 1"):
        alignment(model, processor, make_rows(1))
    with pytest.raises(ValueError, match="all 2 samples show one image"):
        alignment(model, processor, make_rows(2))


# Finished runs


def make_run(output, entry, task, samples, value=50.0, at=0, **more):
    folder = output / "runs" / f"{entry}-{task}-{at}"
    folder.mkdir(parents=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    score = {"value": value, "low": 40.0, "high": 60.0, "n": len(samples), "higher_is_better": True}
    result = {
        "run": f"{entry} / {task}",
        "entry": {"name": entry, "group": "", "view": "full", "granularity": None, "overrides": {}, **more},
        "task": {"name": task},
        "metrics": {"unclear": {**score, "higher_is_better": False}, "accuracy": score} if value else {},
        "finished_at": f"2026-01-01T00:00:0{at}+00:00",
    }
    (folder / "result.json").write_text(json.dumps(result))


def make_sample(number, level="coarse", pixel=36, semantic=2, **doc):
    return {
        "id": number,
        "question": "Answer shortly. What is it?",
        "granularity": level,
        "view": level and "full",
        "pixel_tokens": pixel,
        "semantic_tokens": semantic,
        "doc": doc,
    }


def test_visual_tokens_are_those_that_the_samples_count(tmp_path):
    samples = [make_sample(number, semantic=number) for number in range(5)]
    make_run(tmp_path, "ours", "pope", samples, at=1)
    make_run(tmp_path, "ours", "pope", samples[:1], at=0)  # an older run of the same
    make_run(tmp_path, "short", "pope", [make_sample(0, pixel=0, semantic=5)] * 3, view="semantic")
    report = accuracy_against_tokens(finished_runs(tmp_path))
    ours, short = report["points"] if report["points"][0]["entry"] == "ours" else report["points"][::-1]
    assert ours["samples"] == 5 and ours["tokens"][0] == 38 and ours["semantic_tokens"][0] == 2
    low, high = ours["tokens"][1:]
    assert 36 <= low < 38 < high <= 40
    assert short["tokens"] == (5, 5, 5) and short["view"] == "semantic"
    assert ours["metric"] == "accuracy" and ours["value"] == [50, 40, 60]
    assert "| pope |  | ours | full | chosen | 5 | 38.0 [" in tokens_markdown(report)
    assert draw_tokens(report).axes


def test_entries_are_shown_with_view_and_level(tmp_path):
    make_run(tmp_path, "ours", "pope", [make_sample(0)], at=0)
    make_run(tmp_path, "ours", "pope", [make_sample(0)], at=1, view="semantic", granularity="coarse")
    runs = finished_runs(tmp_path)
    assert len(runs) == 2
    texts = [text.get_text() for text in draw_tokens(accuracy_against_tokens(runs)).legends[0].get_texts()]
    assert texts == ["ours (full)", "ours (semantic, coarse)"]


def test_runs_without_score_or_visual_tokens_are_left_out_with_the_reason(tmp_path):
    make_run(tmp_path, "ours", "pope", [make_sample(0)])
    make_run(tmp_path, "ours", "amber", [make_sample(0)], value=None)
    make_run(tmp_path, "ours", "text", [{"id": 0, "question": "?", "doc": {}}])
    runs = finished_runs(tmp_path)
    report = accuracy_against_tokens(runs)
    assert [point["metric"] for point in report["points"]] == ["accuracy"]
    assert report["left_out"] == {
        "ours / amber (full)": "it has no score",
        "ours / text (full)": "its samples count no visual tokens",
    }
    with pytest.raises(ValueError, match="no run has a score and visual tokens"):
        accuracy_against_tokens([run for run in runs if run["task"]["name"] == "text"])


def test_shares_of_levels_sum_to_one_and_types_come_from_the_data(tmp_path):
    samples = [make_sample(n, ["coarse", "fine"][n % 2], category=["a", "b"][n // 4]) for n in range(8)]
    samples += [make_sample(8, None)]  # a question without an image
    make_run(tmp_path, "ours", "pope", [sample | {"doc": sample["doc"] or {}} for sample in samples])
    make_run(tmp_path, "fixed", "pope", samples, granularity="coarse")
    make_run(tmp_path, "drawn", "pope", samples, overrides={"controller": "random"})
    report = chosen_levels(finished_runs(tmp_path))
    assert report["levels"] == ["coarse", "fine"]
    assert [(entry["type"], entry["samples"]) for entry in report["counts"]] == [("all", 8), ("a", 4), ("b", 4)]
    for entry in report["counts"]:
        assert entry["types_from"] == "category"
        assert sum(entry["share"].values()) == pytest.approx(1)
        assert sum(entry["count"].values()) == entry["samples"]
        assert entry["entropy"] == pytest.approx(1)
    assert set(report["left_out"]) == {"fixed / pope (full, coarse)", "drawn / pope (full, random)"}
    assert "| ours | full | pope | all | 8 | 4 (50%) | 4 (50%) | 1.00 |" in levels_markdown(report)
    assert "since its level is set (random): drawn / pope (full, random)." in levels_markdown(report)
    assert draw_levels(report).axes


def test_types_of_questions_fall_back_to_their_first_words():
    asked = ["Where is it?", "where is she", "Is it day?"]
    samples = [make_sample(number, question=question, category="same") for number, question in enumerate(asked)]
    assert question_types(samples) == ("first words", ["where is", "where is", "is it"])
    assert question_types([make_sample(0), make_sample(1)])[1] == ["answer shortly", "answer shortly"]


def test_rare_types_are_counted_together(tmp_path):
    samples = [make_sample(number, type=f"kind {number}") for number in range(20)]
    make_run(tmp_path, "ours", "seed", samples)
    counts = chosen_levels(finished_runs(tmp_path))["counts"]
    assert [entry["type"] for entry in counts][-1] == "other" and len(counts) == 10
    assert sum(entry["samples"] for entry in counts[1:]) == counts[0]["samples"] == 20


def test_missing_runs_and_levels_are_named(tmp_path):
    with pytest.raises(ValueError, match="has no finished runs; run granulon-evaluate"):
        finished_runs(tmp_path)
    make_run(tmp_path, "fixed", "pope", [make_sample(0)], granularity="coarse")
    with pytest.raises(ValueError, match="no run has a level that the model chose"):
        chosen_levels(finished_runs(tmp_path))
    with pytest.raises(ValueError, match=r"no finished run of \['gone'\]; it has \['fixed'\]"):
        finished_runs(tmp_path, ["gone"])


# Calibration


def test_reliability_has_the_scores_of_level_scores_and_bins_that_make_up_its_error():
    # Two rows at 0.95, one of them right; two at 0.65, both right: |0.95 - 0.5| / 2 + |0.65 - 1| / 2.
    probs_BG = np.array([[0.95, 0.05], [0.95, 0.05], [0.35, 0.65], [0.35, 0.65]])
    level_B = np.array([0, 1, 1, 1])
    found = reliability(probs_BG, level_B, list("abcd"))
    assert found.items() >= scores(probs_BG, level_B, list("abcd")).items()
    assert found["ece"][0] == pytest.approx(0.4)
    assert [(entry["rows"], entry["accuracy"][0]) for entry in found["bins"]] == [(2, 1.0), (2, 0.5)]
    gaps = [entry["rows"] / 4 * abs(entry["confidence"] - entry["accuracy"][0]) for entry in found["bins"]]
    assert sum(gaps) == pytest.approx(found["ece"][0])


def make_corpus(count=12):
    return [
        {"question": f"Question {number}, {'why' * (number % 3)}?", "level": ["coarse", "fine"][number % 2]}
        | {"split": ["test_kinds", "test_questions", "train"][number % 3]}
        for number in range(count)
    ]


def test_calibration_is_that_of_the_levels_that_the_model_chooses(model, processor):
    rows = make_corpus()
    report = calibration(model, processor, rows)
    assert list(report["splits"]) == ["test_kinds", "test_questions"]
    for split, part in report["splits"].items():
        own = [row for row in rows if row["split"] == split]
        right = []
        for row in own:
            ids_1T = torch.tensor([processor.tokenizer(row["question"])["input_ids"]])
            level = int(model.model.question_logits(ids_1T).argmax())
            right.append(model.config.granularity_names[level] == row["level"])
        assert part["rows"] == len(own) and part["accuracy"][0] == pytest.approx(np.mean(right))
    assert "| test_kinds | 4 |" in calibration_markdown(report)
    assert len(draw_calibration(report).axes) == 2


def test_a_corpus_or_model_that_cannot_be_calibrated(model, processor):
    with pytest.raises(ValueError, match="expected question, and level or level_probs"):
        calibration(model, processor, [{"question": "Where?"}])
    with pytest.raises(ValueError, match="0 rows in splits that begin with 'test', of 12 in all"):
        calibration(model, processor, [row | {"split": "train"} for row in make_corpus()])
    with pytest.raises(ValueError, match="no controller that learns"):
        calibration(make_model(controller="random"), processor, make_corpus())


# Rows and the command


def test_questions_have_answers_and_may_be_limited(tmp_path):
    make_image().save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "What?", "truth": "this"}, {"image": "a.png", "question": "Where?"}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    found = read_questions(str(tmp_path / "list.json"))
    assert [row["answer"] for row in found] == ["this", None]
    assert Image.open(found[0]["image"]).size == (40, 30)
    assert len(read_questions(str(tmp_path / "list.json"), limit=1)) == 1


def test_the_command_writes_and_prints_an_analysis(tiny, tmp_path, capsys):
    options = ["--model", str(tiny), "--rows", str(tiny.parent / "rows.json"), "--output", str(tmp_path)]
    main(["alignment", *options, "--granularity", "0"])
    assert "question × pixel" in capsys.readouterr().out
    assert sorted(file.suffix for file in tmp_path.glob("alignment.*")) == [".json", ".md", ".pdf", ".png"]
    report = json.loads((tmp_path / "alignment.json").read_text())
    assert report["arguments"]["granularity"] == "0" and len(report["model"]["sha256"]) == 64
    main(["alignment", *options, "--definition", "authors"])
    assert "answer alone × prompt" in capsys.readouterr().out


def test_the_command_ends_with_one_line_for_what_it_cannot_use(tiny, tmp_path):
    options = ["--model", str(tiny), "--rows", str(tiny.parent / "rows.json"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="granulon-analyse alignment: unknown granularity 'huge'"):
        main(["alignment", *options, "--granularity", "huge"])
    with pytest.raises(SystemExit, match="granulon-analyse alignment: .*found 1"):
        main(["alignment", *options, "--limit", "1"])
    with pytest.raises(SystemExit, match="granulon-analyse budgets: limit is 0"):
        main(["budgets", *options, "--limit", "0"])
    with pytest.raises(SystemExit, match="granulon-analyse tokens: .*has no finished runs"):
        main(["tokens", "--results", str(tmp_path), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="granulon-analyse alignment: .*not found"):
        main(["alignment", "--model", str(tmp_path / "absent"), *options[2:]])
    assert not (tmp_path / "out").exists()
