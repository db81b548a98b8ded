"""Runs are identified by what decides their figures; tables are complete and mark the paper's figures."""

import json
import re
import shlex
from dataclasses import asdict, replace

import numpy as np
import pytest
import yaml

from granulon.evaluation.matrix import (
    MATRICES,
    Entry,
    Matrix,
    Run,
    Settings,
    model_identity,
    read_matrix,
    run_folder,
    run_key,
)
from granulon.evaluation.metrics import METRICS
from granulon.evaluation.protocols import AUTHORS, OURS, PROTOCOLS
from granulon.evaluation.run import main
from granulon.evaluation.sample_rows import SPLITS
from granulon.evaluation.scoring import figures, metric_of
from granulon.evaluation.tables import Results, write_tables
from granulon.train import sft

PAPER = yaml.safe_load((MATRICES / "paper_tables.yaml").read_text())
SETTINGS = Settings()


def make_run(output, entry, task, samples, finished_at="2026-01-01T00:00:00+00:00", settings=SETTINGS, **more):
    """A finished run as granulon-evaluate writes it."""
    key = run_key(entry, {"sha256": entry.model}, {"name": task}, settings)
    folder = run_folder(output, Run(entry, task), f"{key}-{finished_at}")  # several of one key, to choose from
    folder.mkdir(parents=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    result = {
        "run": Run(entry, task).name, "entry": asdict(entry), "task": {"name": task}, "settings": asdict(settings),
        "metrics": figures(samples), "not_computed": {}, "finished_at": finished_at, **more,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def parse(made_by):
    """A command that makes a model, read by granulon-train's own parser; use_cpu, for machines without a GPU."""
    program, *options = shlex.split(made_by)
    assert program == "granulon-train"
    return sft.parse([*options, "--use_cpu", "true"])


def make_samples(figure, values):
    return [{"id": number, "statistics": {figure: [float(value), 1.0]}} for number, value in enumerate(values)]


def write(output, matrix, settings=SETTINGS):
    """All tables of a matrix, as texts by file name."""
    files = write_tables(output, matrix, Results(output, settings))
    return {file.name: file.read_text() for file in files if file.suffix in (".md", ".tex", ".json")}


def test_a_run_key_depends_on_everything_that_decides_its_answers_and_on_nothing_else():
    entry, model, task = Entry("a", "m"), {"sha256": "1", "manifest": {"x": 1}}, {"name": "t", "config": {"a": 1}}
    key = run_key(entry, model, task, SETTINGS)
    same = [
        (
            replace(entry, name="b", group="g", model="elsewhere", tasks=("x",), made_by="it", trained_on=("x",)),
            model,
            task,
            SETTINGS,
        ),
        (entry, {"sha256": "1", "manifest": None}, task, SETTINGS),
        (entry, model, task, replace(SETTINGS, bertscore_model="other")),
    ]
    other = [
        (replace(entry, granularity="fine"), model, task, SETTINGS),
        (replace(entry, view="pixel"), model, task, SETTINGS),
        (replace(entry, overrides={"controller": "random"}), model, task, SETTINGS),
        (entry, {"sha256": "2"}, task, SETTINGS),
        (entry, model, {"name": "t", "config": {"a": 2}}, SETTINGS),
        (entry, model, task, replace(SETTINGS, limit=5)),
        (entry, model, task, replace(SETTINGS, sample_rows=True)),
        (entry, model, task, replace(SETTINGS, protocol=AUTHORS)),
    ]
    assert {run_key(*one) for one in same} == {key}
    assert len({key, *(run_key(*one) for one in other)}) == 1 + len(other)


def test_a_model_is_identified_by_its_weights_and_not_its_folder(tmp_path):
    for name, weights in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    first, second, third = (model_identity(str(tmp_path / name), "main") for name in "abc")
    assert first == second != third
    with pytest.raises(ValueError, match="./no/such was not found locally or on the Hub"):
        model_identity("./no/such", "main")


@pytest.mark.parametrize(
    "text, message",
    [
        ("entries: [", "is not YAML"),
        ("[1]", "holds list; expected entries, tasks"),
        ("{entries: [], tasks: [], colour: 1}", "holds .*'colour'"),
        ("{entries: [{name: a, model: m, hue: 1}], tasks: []}", r"entry 0 of .* has unknown keys \['hue'\]"),
        ("{entries: [{name: a}], tasks: []}", "entry 0 of .* has no model"),
        ("{entries: [{name: a, model: m}, {name: a, model: n}], tasks: []}", "more than one entry named"),
        ("{entries: [{each: {n: [1, 2], m: [1]}, name: $n}], tasks: []}", "entry 0 of .* lists of equal length"),
        ("{entries: [{each: {n: [1]}, name: a, model: $k}], tasks: []}", "entry 0 of .*'k'; expected lists"),
        ("{entries: [], tasks: [], tables: [{name: t, columns: [Beauty]}]}", "table t of .* unknown column 'Beauty'"),
        ("{entries: [], tasks: [], tables: [{name: t}]}", "table t of .* has no columns"),
    ],
)
def test_an_invalid_matrix_is_refused(tmp_path, text, message):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_matrix(str(tmp_path / "m.yaml"))
    with pytest.raises(ValueError, match="there is no matrix nowhere; give a YAML file, or one of matrix, ablations"):
        read_matrix("nowhere")


def test_entries_and_columns_with_each_are_one_for_each_place_in_its_lists(tmp_path):
    (tmp_path / "m.yaml").write_text("""
        tasks: [t]
        entries:
          - each: {size: [small, large], kept: [5, 10]}
            name: $size with $kept
            model: runs/$size
            made_by: 'train --levels [{"keep": $kept}]'
            overrides: {granularities: [{keep: $kept}]}
          - {name: costs $5, model: m}
        tables:
          - {name: t, title: T, columns: [GQA, {each: {n: [1, 2]}, title: score $n, figure: gptscore_$n, tasks: [t]}]}
    """)
    matrix = read_matrix(str(tmp_path / "m.yaml"))
    assert matrix.entries == [
        Entry(
            f"{size} with {kept}",
            f"runs/{size}",
            made_by=f'train --levels [{{"keep": {kept}}}]',
            overrides={"granularities": [{"keep": kept}]},
        )
        for size, kept in (("small", 5), ("large", 10))
    ] + [Entry("costs $5", "m")]
    assert matrix.tables[0]["columns"] == [
        {"title": "GQA", "figure": "exact_match", "tasks": ["gqa"]},
        {"title": "score 1", "figure": "gptscore_1", "tasks": ["t"]},
        {"title": "score 2", "figure": "gptscore_2", "tasks": ["t"]},
    ]


def test_the_ablations_have_these_entries_in_this_order():
    names = {}
    for entry in read_matrix("ablations").entries:
        names.setdefault(entry.group, []).append(entry.name)
    assert names == {
        "Clusters": ["5 clusters", "10 clusters", "20 clusters", "40 clusters"],
        "Clusters, trained": ["5 clusters", "10 clusters", "20 clusters", "40 clusters"],
        "Controller": ["controller", "always coarse", "always medium", "always fine", "random level"],
        "Parts": ["neither", "AdaTA alone", "controller alone", "both"],
        "Attention term": [f"λ_f = {weight}" for weight in (0.0, 0.3, 1.0, 3.0, 10.0, 30.0)],
        "Clustering input": ["features", "attention", "both"],
        "Joint objective": [
            f"λ_d = {pixel}, λ_t = {semantic}"
            for pixel, semantic in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5), (1.0, 1.0))
        ],
        "View": ["full", "pixel", "semantic", "auto"],
    }


@pytest.mark.parametrize("name", ["matrix", "ablations"])
def test_every_training_command_parses_and_writes_the_entrys_model(name):
    matrix = read_matrix(name)
    for entry in matrix.entries:
        run = parse(entry.made_by)
        assert (sft.RECIPES / f"{run.recipe}.yaml").is_file()
        assert entry.model == f"{run.trainer.output_dir}/model", f"{entry.group} {entry.name}"
        if run.sft.granularities == []:  # one view, so that the trainer refuses a weight for another
            assert run.trainer.pixel_loss_weight == run.trainer.semantic_loss_weight == 0, (
                f"{entry.group} {entry.name}"
            )


@pytest.mark.parametrize("name", ["matrix", "ablations"])
def test_every_column_names_a_task_of_the_matrix_and_a_known_figure(name):
    matrix = read_matrix(name)
    groups = {entry.group for entry in matrix.entries}
    assert set(matrix.tasks) <= set(SPLITS)
    for table in matrix.tables:
        assert set(table.get("groups", [])) <= groups
        names = {entry.name for entry in matrix.entries if entry.group in table.get("groups", groups)}
        assert table.get("compare") in {None, *names}
        assert table.get("paper") in {None, *PAPER["tables"]} and table.get("statements") in {
            None,
            *PAPER["statements"],
        }
        for column in table["columns"]:
            figure = column["figure"]
            assert set(column.get("tasks") or table["tasks"]) <= set(matrix.tasks)
            assert figure in METRICS or metric_of(figure) != "mean", figure
            published = [
                values for group in PAPER["tables"].get(table.get("paper"), {}).values() for values in group.values()
            ]
            assert not {"paper"} <= column.keys() & table.keys() or any(
                column["paper"] in values for values in published
            )


def test_the_matrix_is_the_papers_five_encoders_with_two_language_models():
    entries = [entry for entry in read_matrix("matrix").entries if entry.tasks is None]
    assert {(entry.group, entry.name) for entry in entries} == {
        (group, name)
        for group in ("Qwen2.5-1.5B", "Llama-3.2-3B")
        for name in ("CLIP", "SigLIP", "DINOv2", "DINOv3", "Granulon")
    }
    for entry in entries:
        levels = parse(entry.made_by).sft.granularities
        assert levels == (None if entry.name == "Granulon" else []), "baselines are plain encoders"


def test_models_for_one_data_set_are_trained_on_it_and_have_a_table_with_the_papers_figures():
    matrix = read_matrix("matrix")
    special = [entry for entry in matrix.entries if entry.tasks is not None]
    assert {entry.group for entry in special} == {"Qwen2.5-1.5B, FLUX-Reason alone", "Qwen2.5-1.5B, surgical"}
    for entry in special:
        assert entry.trained_on == entry.tasks
        assert (parse(entry.made_by).recipe == "medical-qwen2.5-1.5b") == (entry.group == "Qwen2.5-1.5B, surgical")
    assert set(PAPER["tables"]["medical"]) == {"Qwen2.5-1.5B, surgical"}


def test_the_papers_gptscores_are_multiples_of_a_39th():
    """What the limit of the authors' protocol rests on."""
    tables = [models for table in PAPER["tables"].values() for models in table.values()]
    values = [(name, value) for models in tables for row in models.values() for name, value in row.items()]
    scores = [value for name, value in values if name.endswith("gptscore")]
    shares = [value for name, value in values if name == "phase_recall"]
    assert (len(scores), len(shares)) == (11, 3) and PROTOCOLS[AUTHORS].limit == 39
    assert all(value == round(round(value * 39) / 39, 2) for value in scores)
    assert all(value == round(100 * round(value * 39 / 100) / 39, 2) for value in shares)


def test_the_names_of_the_ablations_match_their_settings():
    entries = {(entry.group, entry.name): entry for entry in read_matrix("ablations").entries}
    for (group, name), entry in entries.items():
        if group == "Clusters":
            assert {f"{level['keep']} clusters" for level in entry.overrides["granularities"]} == {name}
        if group == "Clusters, trained":
            assert [f"{level['keep']} clusters" for level in parse(entry.made_by).sft.granularities] == [name]
        if group == "Attention term":
            assert name == f"λ_f = {entry.overrides['relation_weight']}"
        if group == "Joint objective":
            trainer = parse(entry.made_by).trainer
            assert name == f"λ_d = {trainer.pixel_loss_weight}, λ_t = {trainer.semantic_loss_weight}"
        if group == "View":
            assert name == entry.view


def test_only_the_known_entries_of_the_ablations_are_the_same_run():
    """These are the trained model without changes, on purpose."""
    found = {}
    for entry in read_matrix("ablations").entries:
        key = json.dumps([entry.model, entry.granularity, entry.view, entry.overrides], sort_keys=True)
        found.setdefault(key, []).append((entry.group, entry.name))
    same = sorted(name for names in found.values() if len(names) > 1 for name in names)
    assert same == [
        ("Attention term", "λ_f = 0.0"), ("Clustering input", "both"), ("Clustering input", "features"),
        ("Controller", "controller"), ("Joint objective", "λ_d = 0.5, λ_t = 0.5"),
        ("Parts", "both"), ("View", "full"),
    ]  # fmt: skip
    auto = next(entry for entry in read_matrix("ablations").entries if entry.view == "auto")
    assert {level["view"] for level in auto.overrides["granularities"]} == {"semantic", "full"}


def test_every_score_of_the_judge_is_in_a_table():
    columns = [column for table in read_matrix("matrix").tables for column in table["columns"]]
    shown = {column["figure"] for column in columns}
    assert {name for name in METRICS if name.startswith(("gptscore", "gpt_"))} <= shown


def test_without_results_every_table_is_written_and_says_not_run(tmp_path):
    matrix = read_matrix("matrix")
    written = write(tmp_path, matrix)
    assert set(written) == {
        f"{table['name']}{suffix}" for table in matrix.tables for suffix in (".md", ".tex", ".json")
    }
    for table in matrix.tables:
        text = written[f"{table['name']}.md"]
        entries = [entry for entry in matrix.entries if entry.group in table.get("groups", [entry.group])]
        columns = [set(column.get("tasks") or table["tasks"]) for column in table["columns"]]
        planned = [column <= set(entry.tasks or matrix.tasks) for entry in entries for column in columns]
        assert text.count("| not run") == sum(planned) and text.count("| – ") == len(planned) - sum(planned)
    main(["--matrix", "ablations", "--output", str(tmp_path), "--tables_only"])
    assert {file.stem for file in (tmp_path / "tables").glob("ablation_*.md")} == {
        table["name"] for table in read_matrix("ablations").tables
    }


def test_the_papers_figures_are_marked_as_such(tmp_path):
    written = write(tmp_path, read_matrix("matrix"))
    text, tex = written["main.md"], written["main.tex"]
    for group, models in PAPER["tables"]["main"].items():
        for name, values in models.items():
            (own,) = [line for line in text.splitlines() if line.startswith(f"| {group} | *{name} (paper)*")]
            assert all(f"*{value:.2f}*" in own for value in values.values())
            assert "**" not in own, "only our figures can be the best"
    assert r"\textit{CLIP (paper)}" in tex and r"\textit{50.91}" in tex
    for statement in PAPER["statements"]["main"]:
        assert f"- {statement}" in text
    assert "rows in italics are published" in text and "What the paper's figures rest on" in text
    (paiq,) = [line for line in text.splitlines() if "10 clusters, no controller (PAIQ, arXiv 2609.37685)*" in line]
    assert all(f"*{value}*" in paiq for value in ("37.70", "34.30", "38.60", "57.50"))


def column_of(text, title):
    """The cells of a column by the name of the row, of the entries with Qwen2.5-1.5B."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    place = lines[0].index(title)
    return {cells[1]: cells[place] for cells in lines if cells[0] == "Qwen2.5-1.5B"}


def test_a_table_shows_both_protocols_of_a_folder_and_the_papers_figures_beside_the_authors(tmp_path):
    matrix = read_matrix("matrix")
    entry = next(entry for entry in matrix.entries if entry.name == "Granulon")
    rivals = [one for one in matrix.entries if one.group == entry.group and one.name == "DINOv3"]
    task = "granulon_seedbench_recall"
    for one in (entry, *rivals):
        for protocol, value in ((OURS, 0.25), (AUTHORS, 0.75)):
            make_run(tmp_path, one, task, make_samples("recall", [value] * 20), settings=Settings(protocol=protocol))
    for protocol in (OURS, AUTHORS):  # the same tables after either command
        written = write(tmp_path, matrix, Settings(protocol=protocol))
        text = written["main.md"]
        ours = column_of(text, "SEED-Bench recall")
        authors = column_of(text, "SEED-Bench recall (authors' protocol)")
        assert ours["Granulon"].startswith("25.00") and authors["Granulon"].startswith("75.00")
        assert authors["*Granulon (paper)*"] == "*58.80*" and ours["*Granulon (paper)*"] == ""
        assert "Columns of our protocol:" in text and "Columns of the authors' protocol:" in text
        tests = json.loads(written["main.json"])["tests"]
        assert [(test["figure"], test["protocol"]) for test in tests] == [("recall", OURS), ("recall", AUTHORS)]
        assert "SEED-Bench exact match (authors' protocol)" not in text, "the authors have no exact match"


def test_a_zero_shot_figure_is_marked_as_not_comparable_with_the_papers(tmp_path):
    matrix = read_matrix("matrix")
    entry = next(entry for entry in matrix.entries if entry.name == "Granulon")
    for task in ("granulon_seedbench_recall", "granulon_aokvqa_direct"):
        make_run(tmp_path, entry, task, make_samples("recall", [0.5] * 20), settings=Settings(protocol=AUTHORS))
    text = write(tmp_path, matrix)["main.md"]
    assert column_of(text, "SEED-Bench recall (authors' protocol)")["Granulon"].endswith("†")
    assert not column_of(text, "A-OKVQA recall (authors' protocol)")["Granulon"].endswith("†"), "in LLaVA-1.5's mix"
    assert "† zero-shot, not comparable with the paper's" in text


ENTRIES = [Entry("plain & simple", "a", "G_1"), Entry("ours", "b", "G_1"), Entry("third", "c", "G_1")]
TABLE = {
    "name": "t", "title": "100 % of it", "compare": "ours",
    "columns": [
        {"title": "choice", "tasks": ["one"], "figure": "choice_accuracy"},
        {"title": "both", "tasks": ["one", "two"], "figure": "recall"},
        {"title": "hallucinated", "tasks": ["two"], "figure": "chair_i"},
    ],
}  # fmt: skip


@pytest.fixture
def filled(tmp_path):
    right = [[1] * 6 + [0] * 14, [1] * 15 + [0] * 5]  # 20 samples, the fewest of a test
    for place, entry in enumerate(ENTRIES[:2]):
        samples = make_samples("choice_accuracy", right[place])
        for sample in samples:
            sample["statistics"]["recall"] = sample["statistics"]["choice_accuracy"]
        make_run(tmp_path, entry, "one", samples)
        samples = [
            {"id": number, "statistics": {"recall": [0.25 + place / 2, 1.0], "chair_i": [2 - place, 4, 1, 1, 1, 1]}}
            for number in range(20 + place)
        ]
        make_run(tmp_path, entry, "two", samples)
    return tmp_path


def test_a_table_has_values_with_intervals_the_best_in_bold_and_the_right_direction(filled):
    text = write(filled, Matrix(ENTRIES, ["one", "two"], [TABLE]))["t.md"]
    lines = {line.split(" | ")[1]: line.split(" | ")[2:] for line in text.splitlines() if line.startswith("| G_1")}
    assert re.match(r"30.00 \[1\d.00, \d+.00\]", lines["plain & simple"][0])
    assert lines["ours"][0].startswith("**75.00 [")
    assert lines["ours"][1].startswith("**75.00 [") and lines["plain & simple"][1].startswith("27.50 [")
    assert lines["ours"][2].startswith("**25.00"), "less hallucination is better"
    assert [entry.strip(" |") for entry in lines["third"]] == ["not run"] * 3


def test_entries_are_tested_in_pairs_if_their_samples_are_the_same(filled):
    written = write(filled, Matrix(ENTRIES, ["one", "two"], [TABLE]))
    tests = json.loads(written["t.json"])["tests"]
    assert [(test["theirs"], test["figure"]) for test in tests] == [
        ("plain & simple", "choice_accuracy"), ("plain & simple", "recall"), ("plain & simple", "recall"),
        ("plain & simple", "chair_i"),
    ]  # fmt: skip
    assert tests[0]["test"] == "McNemar" and tests[0]["p"] == pytest.approx(2 * 0.5**9)
    assert tests[0]["p_corrected"] == tests[0]["p"], "the one planned test of its column"
    assert tests[1]["test"] == "swaps" and tests[1]["p"] == pytest.approx(2 * 0.5**9, abs=0.002)
    assert "ours has 21 samples and plain & simple 20, 20 of them the same; run both on the same" in written["t.md"]


def test_fewer_than_twenty_samples_say_that_nothing_can_be_concluded(tmp_path):
    for entry, values in zip(ENTRIES[:2], ([1] * 19, [0] * 19)):
        make_run(tmp_path, entry, "one", make_samples("choice_accuracy", values))
    text = write(tmp_path, Matrix(ENTRIES[:2], ["one"], [TABLE | {"columns": TABLE["columns"][:1]}]))["t.md"]
    assert "19 samples: with fewer than 20 nothing can be concluded" in text and "0.0000" not in text


def simulated(folder, effect, seed, rivals=7, samples=500):
    """A matrix of a model and its rivals on one column; what is hard for one is mostly hard for all."""
    random = np.random.default_rng(seed)
    hard_N = random.random(samples)
    names = ["ours", *(f"rival {number}" for number in range(rivals))]
    entries = [Entry(name, name, "G") for name in names]
    for entry in entries:
        rate = 0.5 + (effect if entry.name == "ours" else 0)
        own_N = 0.7 * hard_N + 0.3 * random.random(samples)
        threshold = np.quantile(0.7 * random.random(20_000) + 0.3 * random.random(20_000), rate)
        make_run(folder, entry, "one", make_samples("choice_accuracy", (own_N < threshold).astype(int).tolist()))
    written = write(folder, Matrix(entries, ["one"], [TABLE | {"columns": TABLE["columns"][:1]}]))
    return [test["p_corrected"] for test in json.loads(written["t.json"])["tests"]]


def test_an_effect_of_eight_points_is_found_among_seven_rivals_after_correction(tmp_path):
    found = np.concatenate([simulated(tmp_path / f"{seed}", 0.08, seed) for seed in range(6)])
    assert len(found) == 42 and (found < 0.05).mean() > 0.8


def test_without_an_effect_few_matrices_find_one(tmp_path):
    found = [min(simulated(tmp_path / f"{seed}", 0.0, seed, rivals=3, samples=120)) < 0.05 for seed in range(60)]
    assert np.mean(found) <= 0.05 + 2 * (0.05 * 0.95 / 60) ** 0.5


def test_entries_are_not_tested_on_changed_data(tmp_path):
    for place, entry in enumerate(ENTRIES[:2]):
        samples = make_samples("choice_accuracy", [1, 0, 1] * 7)
        for number, sample in enumerate(samples):
            sample["doc_sha256"] = f"{number} {place if number == 2 else ''}"
        make_run(tmp_path, entry, "one", samples)
    text = write(tmp_path, Matrix(ENTRIES, ["one", "two"], [TABLE]))["t.md"]
    assert "sample 2 differs: the data changed between the two runs" in text


def test_a_yes_rate_is_never_the_best(tmp_path):
    for entry, yes in zip(ENTRIES[:2], (0, 1)):
        statistics = {"yes_no_yes_rate": [1.0, yes, 1.0, 0.0, 0.0, 2.0]}
        make_run(tmp_path, entry, "pope", [{"id": 0, "statistics": statistics}])
    table = {"name": "t", "title": "", "columns": [{"title": "yes", "tasks": ["pope"], "figure": "yes_no_yes_rate"}]}
    text = write(tmp_path, Matrix(ENTRIES[:2], ["pope"], [table]))["t.md"]
    assert "50.00" in text and "**50.00" not in text


def test_figures_without_bertscore_do_not_depend_on_its_settings(tmp_path):
    make_run(tmp_path, ENTRIES[0], "one", make_samples("choice_accuracy", [1]))
    assert Results(tmp_path, replace(SETTINGS, bertscore_model="other")).result(ENTRIES[0], "one")
    make_run(tmp_path, ENTRIES[0], "two", make_samples("bertscore", [1]))
    assert not Results(tmp_path, replace(SETTINGS, bertscore_model="other")).result(ENTRIES[0], "two")


def test_latex_escapes_its_special_characters(filled):
    write(filled, Matrix(ENTRIES, ["one", "two"], [TABLE]))
    tex = (filled / "tables" / "t.tex").read_text()
    assert r"plain \& simple" in tex and r"G\_1" in tex and r"\textbf{75.00" in tex and tex.count(r"\\") == 4
    assert tex.startswith(r"\begin{tabular}{llrrr}") and tex.rstrip().endswith(r"\end{tabular}")


def test_the_newest_of_equal_runs_is_shown_and_runs_with_other_settings_are_only_counted(tmp_path, capsys):
    entry, few = Entry("a", "m"), replace(SETTINGS, limit=5)
    make_run(tmp_path, entry, "one", make_samples("choice_accuracy", [0]), "2026-03-01")
    make_run(tmp_path, entry, "one", make_samples("choice_accuracy", [1]), "2026-04-01", few)
    make_run(tmp_path, entry, "one", make_samples("choice_accuracy", [1, 0]), "2025-01-01", few)
    matrix = Matrix([entry], ["one"], [])
    assert "| 0.00 " in write(tmp_path, matrix)["results.md"]
    assert Results(tmp_path, SETTINGS).other_settings == {("limit",): 2}
    assert "| 100.00 " in write(tmp_path, matrix, few)["results.md"]
    main(["--model", "m", "--tasks", "one", "--output", str(tmp_path), "--tables_only"])
    assert "2 finished runs are in no table, since they have another limit" in capsys.readouterr().out


def test_a_missing_figure_is_shown_with_its_reason(tmp_path):
    entry = Entry("a", "m")
    never_yes = [{"id": 0, "statistics": {"yes_no_precision": [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]}}]
    make_run(tmp_path, entry, "pope", never_yes)
    make_run(tmp_path, entry, "two", [], not_computed={"bertscore": "no model"})
    columns = [
        {"title": name, "tasks": [task], "figure": name}
        for task, name in (("pope", "yes_no_precision"), ("two", "bertscore"), ("two", "bleu"), ("two", "gptscore"))
    ]
    text = write(tmp_path, Matrix([entry], ["pope", "two"], [{"name": "t", "title": "T", "columns": columns}]))["t.md"]
    assert "| a | undefined | not computed | no such figure | not judged |" in text


def test_a_table_with_unknown_keys_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the table t has unknown keys \['colour'\]"):
        write(tmp_path, Matrix(ENTRIES, ["one"], [{**TABLE, "colour": 1}]))
