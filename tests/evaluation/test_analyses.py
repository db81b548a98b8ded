"""The analyses compare the right states, count what the samples count, and say clearly what they cannot use."""

import json

import numpy as np
import pytest
import torch
from conftest import count_calls, make_image, make_model, make_processor
from PIL import Image, ImageColor

from granulon.evaluation.analyses.alignment import (
    alignment,
    alignment_markdown,
    compare,
    draw_alignment,
    mean_states,
    prompts_with_answers,
)
from granulon.evaluation.analyses.files import first_row_of_each_image, read_questions, write_analysis
from granulon.evaluation.analyses.levels import (
    CHOSEN,
    calibration,
    calibration_markdown,
    cluster_rows,
    clusters_markdown,
    draw_calibration,
    draw_clusters_sheet,
    reliability,
)
from granulon.evaluation.analyses.results import (
    accuracy_against_tokens,
    chosen_levels,
    draw_levels,
    draw_tokens,
    finished_runs,
    levels_markdown,
    question_types,
    tokens_markdown,
)
from granulon.evaluation.analyses.run import main
from granulon.evaluation.analyses.speed import draw_speed, measure_speed, speed_markdown
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


def states_of(pixel, semantic, question, answer):
    """(S,1,4,E) from a list of vectors for each group."""
    return np.stack([np.asarray(group, float) for group in (pixel, semantic, question, answer)], 1)[:, None]


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
    pairs = compare(states_of(one, other, one, other), ["a", "b"])
    assert cosine_of(pairs, "question", "pixel") == pytest.approx(1)
    assert cosine_of(pairs, "question", "semantic") == pytest.approx(0)
    assert cosine_of(pairs, "answer", "semantic") == pytest.approx(1)
    assert cosine_of(pairs, "question", "pixel", "cosine_other_image") == pytest.approx(0)


def test_centring_takes_away_a_direction_that_all_states_share():
    random = np.random.default_rng(0)
    common = 100 * np.ones(64)
    groups = [common + random.normal(size=(40, 64)) for _ in range(4)]
    groups[2] = groups[0] - 50  # the question says what the pixels say, and the answer something else
    pairs = compare(states_of(*groups), [str(number) for number in range(40)])
    assert cosine_of(pairs, "answer", "pixel") > 0.99
    assert abs(cosine_of(pairs, "answer", "pixel", "centred")) < 0.1
    assert cosine_of(pairs, "question", "pixel", "centred") == pytest.approx(1)
    assert abs(cosine_of(pairs, "question", "pixel", "centred_other_image")) < 0.1


def test_a_state_that_never_changes_has_no_centred_cosine():
    same, other = np.ones((4, 3)), np.eye(4)[:, :3] + 1
    pairs = compare(states_of(other, other, same, other), list("abcd"))
    assert np.isnan(cosine_of(pairs, "question", "pixel", "centred"))
    assert np.isfinite(cosine_of(pairs, "question", "pixel"))


def test_intervals_come_from_images_and_not_from_questions():
    random = np.random.default_rng(0)
    one, other = random.normal(size=(12, 8)), random.normal(size=(12, 8))
    repeated = states_of(*(np.repeat(group, 10, 0) for group in (one, one, other, other)))
    once = states_of(one, one, other, other)
    images = [str(number) for number in range(12)]
    few = compare(once, images)[0]["cosine"][0]
    many = compare(repeated, [name for name in images for _ in range(10)])[0]["cosine"][0]
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
    states_LCE = mean_states(model, processor, [row], granularity="fine")[0][0]
    pixels = processor.image_processor(row["image"], return_tensors="pt")["pixel_values"]
    seen = model.explain(pixels, granularity="fine")
    tokens_RE, kept = seen.image_hidden_states[0], int(seen.semantic_mask.sum())
    assert 0 < kept <= 5
    embeddings = model.get_input_embeddings()
    wanted = [tokens_RE[:36].mean(0), tokens_RE[len(tokens_RE) - kept :].mean(0)]
    for text in (row["question"], row["answer"]):
        wanted.append(embeddings(torch.tensor(processor.tokenizer(text)["input_ids"])).mean(0))
    assert np.allclose(states_LCE[0], torch.stack(wanted).detach().numpy(), atol=1e-5)
    assert states_LCE.shape == (1 + model.config.text_config.num_hidden_layers, 4, 32)


def test_states_come_from_images_that_were_encoded_once(model, processor):
    calls = count_calls(model)
    mean_states(model, processor, make_rows(), granularity="coarse", batch_size=4)
    assert calls == {"vision_tower": 1, "granularity_controller": 1, "aggregation": 1}


def test_a_sample_in_a_padded_batch_is_the_sample_alone(model, processor):
    rows = make_rows()
    together, images = mean_states(model, processor, rows, batch_size=4)
    alone, _ = mean_states(model, processor, rows, batch_size=1)
    assert np.allclose(together, alone, atol=1e-4)
    assert images[0] == images[1] != images[2] == images[3]


def test_the_last_layer_is_what_the_head_reads(model, processor):
    (row,) = make_rows(1, answers=False)
    states_LCE = mean_states(model, processor, [row])[0][0]
    inputs, texts_B2T = prompts_with_answers(processor, [row], [row["image"]])
    with torch.no_grad():
        last_TE = model.model(**inputs).last_hidden_state[0]
    assert np.allclose(states_LCE[-1, 2], last_TE[texts_B2T[0, 0]].mean(0).numpy(), atol=1e-4)
    assert np.isnan(states_LCE[:, 3]).all(), "there is no answer"


def test_the_whole_alignment_and_its_picture(model, processor, tmp_path):
    report = alignment(model, processor, make_rows(8))
    assert report["layers"] == 2 and report["samples"] == 8 and report["images"] == 4
    assert [pair["samples"] for pair in report["pairs"]] == [8] * 7
    assert all(-1.001 <= entry[0] <= 1.001 for pair in report["pairs"] for entry in pair["cosine"])
    projector = next(pair for pair in report["pairs"] if pair["image"] == "projector")
    assert projector["cosine"][0] == pytest.approx(report["pairs"][0]["cosine"][0])
    files = write_analysis(
        tmp_path, "alignment", report, alignment_markdown(report), draw_alignment(report, "a model")
    )
    assert [file.suffix for file in files] == [".json", ".md", ".png", ".pdf"]
    assert json.loads(files[0].read_text())["pairs"][0]["text"] == "question"
    assert "question × semantic" in files[1].read_text()
    assert sorted(tmp_path.iterdir()) == sorted(files), "nothing half-written stays"


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


# Clusters


def test_the_sheet_has_a_picture_for_each_level_and_frames_the_chosen_one(model, processor):
    found = cluster_rows(model, processor, make_rows(2))
    names = model.config.granularity_names
    assert [list(row["levels"]) for row in found] == [names, names]
    one = draw_clusters_sheet(found[:1], model.config.granularities)
    two = draw_clusters_sheet(found, model.config.granularities)
    assert two.width == one.width and two.height > one.height + 150
    for row in found:
        column = 1 + names.index(row["chosen"])
        page = np.asarray(draw_clusters_sheet([row], model.config.granularities))
        framed = np.flatnonzero((page == ImageColor.getrgb(CHOSEN)).all(-1).sum(0) > 100)
        assert len(framed) and framed.min() > 200 * column and framed.max() < 230 * (column + 1)
    assert f"{len(found[0]['levels']['fine']['clusters'])} tokens" in clusters_markdown(found)


def test_a_sheet_needs_levels_and_rows(model, processor):
    with pytest.raises(ValueError, match="no levels of granularity"):
        cluster_rows(make_model(granularities=[]), make_processor(num_semantic_tokens=0), make_rows(1))
    with pytest.raises(ValueError, match="there are no rows"):
        cluster_rows(model, processor, [])


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


def test_entries_of_one_name_are_shown_with_view_and_level(tmp_path):
    make_run(tmp_path, "ours", "pope", [make_sample(0)], at=0)
    make_run(tmp_path, "ours", "pope", [make_sample(0)], at=1, view="semantic", granularity="coarse")
    runs = finished_runs(tmp_path)
    assert len(runs) == 2
    texts = [text.get_text() for text in draw_tokens(accuracy_against_tokens(runs)).legends[0].get_texts()]
    assert texts == ["ours, full", "ours, semantic, coarse"]


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


# Speed


def test_every_view_and_level_is_measured_against_the_full_view(model, processor):
    report = measure_speed(model, processor, make_rows(2), new_tokens=8)
    settings = {setting["name"]: setting for setting in report["settings"]}
    assert [*settings] == ["full", "pixel", "semantic", "auto"] + [
        f"{level}, {view}" for level in model.config.granularity_names for view in ("full", "semantic")
    ]
    assert settings["full"]["first_token_ratio"] == (1, 1, 1) and settings["full"]["speed_ratio"] == (1, 1, 1)
    assert all(setting["first_token_ms"][0] > 0 and setting["peak_mb"] > 0 for setting in report["settings"])
    assert settings["pixel"]["visual_tokens"] == 36
    assert settings["coarse, full"]["visual_tokens"] == 36 + settings["coarse, semantic"]["visual_tokens"]
    chosen = {name: settings[name]["visual_tokens"] for name in ("full", "semantic", "auto")}
    assert chosen["semantic"] <= chosen["auto"] <= chosen["full"] == 36 + chosen["semantic"]
    assert report["rounds"] == 2 and "| coarse, semantic |" in speed_markdown(report)
    assert len(draw_speed(report).axes) == 3
    with pytest.raises(ValueError, match="there are 0 rows and new_tokens is 1"):
        measure_speed(model, processor, [], new_tokens=1)
    with pytest.raises(ValueError, match="no levels of granularity"):
        measure_speed(make_model(granularities=[]), processor, make_rows(1))


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
    assert len(draw_calibration(report).axes) == 4


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
    assert [row["question"] for row in first_row_of_each_image(found)] == ["What?"]
    assert len(read_questions(str(tmp_path / "list.json"), limit=1)) == 1


def test_the_command_writes_and_prints_an_analysis(tiny, tmp_path, capsys):
    rows = str(tiny.parent / "rows.json")
    main(["alignment", "--model", str(tiny), "--rows", rows, "--output", str(tmp_path), "--granularity", "0"])
    main(["clusters", "--model", str(tiny), "--rows", rows, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "question × pixel" in printed and "level chosen" in printed
    names = ["alignment.json", "alignment.md", "alignment.pdf", "alignment.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *names,
        *("clusters.json", "clusters.md", "clusters.png"),
    ]
    report = json.loads((tmp_path / "alignment.json").read_text())
    assert report["arguments"]["granularity"] == "0" and len(report["model"]["sha256"]) == 64


def test_the_command_ends_with_one_line_for_what_it_cannot_use(tiny, tmp_path):
    options = ["--model", str(tiny), "--rows", str(tiny.parent / "rows.json"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="granulon-analyse alignment: unknown granularity 'huge'"):
        main(["alignment", *options, "--granularity", "huge"])
    with pytest.raises(SystemExit, match="granulon-analyse alignment: .*found 1"):
        main(["alignment", *options, "--limit", "1"])
    with pytest.raises(SystemExit, match="granulon-analyse speed: limit is 0"):
        main(["speed", *options, "--limit", "0"])
    with pytest.raises(SystemExit, match="granulon-analyse tokens: .*has no finished runs"):
        main(["tokens", "--results", str(tmp_path), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="granulon-analyse clusters: .*not found"):
        main(["clusters", "--model", str(tmp_path / "absent"), *options[2:]])
    assert not (tmp_path / "out").exists()
