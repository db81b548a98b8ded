"""What of a checkpoint folder is published, what the card says, and what is refused; no Hub is needed for it."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from published_files import changed_manifest, cut_short, make_adapter, make_checkpoint, save_parts

from granulon.hub.assemble import TRAINABLE, assemble
from granulon.hub.licences import terms
from granulon.hub.manifest import ROOT, weights_sha256
from granulon.hub.package import ADAPTER, MODEL, TRAINABLE_ONLY, evaluation_files, make_package, size_of

REPO = "jinlab/granulon-qwen1.5b"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("package") / "checkpoint")


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    return make_adapter(checkpoint, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of the checkpoint that a test may change."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def package_of(folder, kind=MODEL, **options):
    return make_package(folder, kind, terms(folder, REPO), REPO, "v0.1.0", **options)


def bytes_of(content):
    return content if isinstance(content, bytes) else content.read_bytes()


def test_the_card_explains_how_to_load_what_is_inside_and_validates(checkpoint):
    card = ModelCard(package_of(checkpoint).files["README.md"].decode())
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0" and "custom_code" in card.data.tags
    assert f'model="{REPO}", revision="v0.1.0"' in card.text and "Not for clinical use" in card.text
    assert "| sft | tiny-cpu | rows.json | 7 | 3 | 0 | 1 |" in card.text
    assert "| lmms-lab/POPE | pope | 0.5 | made up for a test |" in card.text
    assert "| coarse | 2 | 6 | 5 |" in card.text and "2603.08800" in card.text
    assert "The licence of the training data" in card.text
    assert "{{" not in card.text and "{%" not in card.text


def test_files_in_a_subfolder_are_not_part_of_the_checkpoint(checkpoint, copy):
    shutil.copytree(checkpoint, copy / "checkpoint-4")
    assert package_of(copy).files.keys() == package_of(checkpoint).files.keys()


def test_no_folder_of_this_machine_is_named_in_what_is_published(checkpoint, tmp_path):
    save_parts(checkpoint, tmp_path)
    folder = assemble(tmp_path / "vision", tmp_path / "text", tmp_path / "assembled")
    assert str(tmp_path) not in (folder / "config.json").read_text()
    shutil.copy(checkpoint / "granulon_manifest.json", folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json"):
        content = json.loads((folder / name).read_text()) | {"_name_or_path": str(tmp_path / "mine")}
        (folder / name).write_text(json.dumps(content))
    (folder / "controller_report.json").write_text(json.dumps({"corpus": [str(tmp_path / "seed.jsonl")]}))
    files = package_of(folder).files
    sent = {name: bytes_of(content) for name, content in files.items()}
    assert [name for name, content in sent.items() if str(tmp_path).encode() in content] == []
    assert json.loads(sent["controller_report.json"]) == {"corpus": ["seed.jsonl"]}
    assert sent["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    assert {name: size_of(content) for name, content in files.items()} == {name: len(sent[name]) for name in sent}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda folder: cut_short(folder / "model.safetensors"), "model.safetensors is damaged or cut short"),
        (lambda folder: (folder / "config.json").unlink(), "has neither config.json nor adapter_config.json"),
        (lambda folder: (folder / "processor_config.json").unlink(), "has no processor"),
        (
            lambda folder: (folder / "image_io.py").write_text("import os"),
            r"than this package \(image_io.py",
        ),
        (lambda folder: (folder / "image_io.py").unlink(), r"than this package \(image_io.py"),
        (lambda folder: (folder / "evil.py").write_text("import os"), r"than this package \(evil.py"),
        (lambda folder: (folder / ".eval_results" / "x.yaml").write_text("a: ["), "does not hold evaluation results"),
        (lambda folder: (folder / "granulon_manifest.json").unlink(), "no granulon_manifest.json"),
    ],
)
def test_an_incomplete_folder_and_other_code_are_refused(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message):
        package_of(copy)


def test_a_missing_shard_is_named(copy):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="lacks model-00002-of-00002.safetensors"):
        package_of(copy)


def test_projector_and_controller_alone_are_refused_where_others_could_not_assemble_the_model(copy):
    with pytest.raises(ValueError, match="the language model was trained too"):
        package_of(copy, TRAINABLE_ONLY)
    changed_manifest(copy, training=[{"stage": "align"}])
    with pytest.raises(ValueError, match="the vision and text part came from a local folder"):
        package_of(copy, TRAINABLE_ONLY)


# ----- adapters


@pytest.mark.parametrize(
    "named, base, message",
    [
        ({}, None, "a folder of this machine: publish the base, and name it with --base_model"),
        ({"base_model_name_or_path": None}, None, "names no base model: .* --base_model OWNER/NAME@REVISION"),
        ({}, "jinlab/base", "unknown revision of jinlab/base.* --base_model jinlab/base@REVISION"),
    ],
)
def test_an_adapter_without_a_known_base_is_refused(adapter, tmp_path, named, base, message):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text()) | named
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        package_of(folder, ADAPTER, base=base)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: cut_short(folder / "adapter_model.safetensors"), "adapter_model.safetensors is damaged"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "lacks adapter_model.safetensors"),
        (lambda folder: (folder / "processor_config.json").unlink(), "has no processor"),
        (lambda folder: (folder / "image_io.py").write_text("import os"), "other code than this package"),
        (lambda folder: (folder / "evil.py").write_text("import os"), "other code than this package"),
    ],
)
def test_an_incomplete_adapter_and_other_code_are_refused(adapter, tmp_path, damage, message):
    folder = shutil.copytree(adapter, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        package_of(folder, ADAPTER, base="jinlab/base@abc")


# ----- evaluation results


@pytest.fixture
def results(checkpoint, tmp_path):
    """A function that writes a finished run, changed at the dotted names of its entries, and returns the folder."""

    def write(name="pope-1", **changes):
        metric = {"value": 0.86123, "low": 0.84, "high": 0.88, "n": 9000, "higher_is_better": True}
        result = {
            "entry": {"model": str(checkpoint), "granularity": None, "view": "full", "overrides": {}},
            "task": {"name": "pope", "config": {"dataset_path": "lmms-lab-encoder/POPE"}},
            "settings": {"limit": None, "sample_rows": False},
            "model": {"sha256": weights_sha256(checkpoint)},
            "metrics": {"pope_accuracy": metric, "pope_recall": {"value": None, "low": None, "high": None, "n": 0}},
            "not_computed": {},
            "finished_at": "2026-01-02T03:04:05+00:00",
        }
        for path, value in changes.items():
            *parents, last = path.split("__")
            place = result
            for parent in parents:
                place = place[parent]
            place[last] = value
        folder = tmp_path / "results" / "runs" / name
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))
        return tmp_path / "results"

    return write


def test_a_finished_run_becomes_a_file_that_the_hub_reads_and_a_row_of_the_card(results, checkpoint):
    files = package_of(checkpoint, results=results(task__name="mmvp")).files
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/mmvp.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("lmms-lab-encoder/POPE", "mmvp.pope_accuracy", 0.8612)
    assert entry.notes == "95% interval 0.8400 to 0.8800, n = 9000" and entry.date.startswith("2026-01-02T03:04:05")
    card = files["README.md"].decode()
    assert f"| lmms-lab-encoder/POPE | mmvp.pope_accuracy | 0.8612 | {entry.notes} |" in card
    assert "| lmms-lab/POPE | pope | 0.5 | made up for a test |" in card, "results in the folder stay"


def test_the_newest_run_of_a_task_counts(results, checkpoint):
    newer = {"value": 0.9, "low": 0.8, "high": 1.0, "n": 1}
    results("a", finished_at="2026-02-01T00:00:00+00:00", metrics={"accuracy": newer})
    files = evaluation_files(results("b"), checkpoint)
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/pope.yaml"]))
    assert entry.value == 0.9


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"sha256": "of other weights"}},
        {"model": {"revision": "abc"}},
        {"not_computed": {"bertscore": "no network"}},
        {"entry__granularity": "fine"},
        {"entry__view": "semantic"},
        {"entry__overrides": {"controller": "random"}},
        {"settings__limit": 10},
        {"settings__sample_rows": True},
        {"task__config": {"dataset_path": "data/surgvlm/phase"}},
    ],
)
def test_a_run_with_other_weights_settings_or_data_does_not_count(results, checkpoint, change):
    with pytest.raises(ValueError, match="none of the 1 runs in .* has the weights of"):
        evaluation_files(results(**change), checkpoint)


def test_trained_parts_alone_are_published_as_they_are_with_their_adapters():
    folder = ROOT / "checkpoints/granulon-small"
    package = package_of(folder, TRAINABLE_ONLY)
    assert package.files[TRAINABLE] == (folder / TRAINABLE).read_bytes()
    assert {"config.json", "processor_config.json", "chat_template.jinja", "NOTICE"} < package.files.keys()
    assert not any(name.endswith(".py") for name in package.files)
    card = package.files["README.md"].decode()
    assert f"granulon-assemble --trained {REPO}@v0.1.0" in card, "encoder and language model are named by the manifest"
    assert "adapters of the language model" in card
