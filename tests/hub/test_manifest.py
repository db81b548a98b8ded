"""The manifest of a checkpoint, its training records, and the versions of the code that made it."""

import json
import subprocess

import pytest
import transformers

from granulon.evaluation.matrix import model_identity
from granulon.hub import manifest


def git(folder, *command):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *identity, *command], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_commit_of_a_clone_is_found_and_marked_if_files_were_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "ROOT", tmp_path)
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    git(tmp_path, "tag", "v1")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    assert manifest.git_commit() == commit
    (tmp_path / "code.py").write_text("2\n")
    assert manifest.git_commit() == f"{commit}-dirty"


def test_an_installed_package_without_a_clone_has_no_commit(tmp_path, monkeypatch):
    git(tmp_path, "init", "--quiet")  # a folder of the user's, with an environment in it
    monkeypatch.setattr(manifest, "ROOT", tmp_path / "venv" / "site-packages")
    assert manifest.git_commit() is None


def test_versions_are_those_of_the_libraries_and_none_for_an_absent_one():
    found = manifest.versions("transformers", "no-such-library")
    assert found["transformers"] == transformers.__version__
    assert found["no-such-library"] is None
    assert "granulon_commit" in found


def test_training_records_are_appended_to_the_manifest(tmp_path):
    manifest.append_training_record(tmp_path, ("torch",), stage="align", steps=3)
    manifest.write_manifest(
        tmp_path, json.loads((tmp_path / manifest.MANIFEST).read_text()) | {"vision": {}, "text": {}}
    )
    manifest.append_training_record(tmp_path, ("torch",), stage="sft", steps=5)
    first, second = manifest.read_manifest(tmp_path)["training"]
    assert (first["stage"], second["stage"], second["steps"]) == ("align", "sft", 5)
    assert first["versions"].keys() == {"torch", "granulon_commit"}


@pytest.mark.parametrize(
    "content, message", [(None, "has no granulon_manifest.json"), ({"vision": {}}, "not name the")]
)
def test_a_missing_or_incomplete_manifest_is_refused(tmp_path, content, message):
    if content:
        manifest.write_manifest(tmp_path, content)
    with pytest.raises(ValueError, match=message):
        manifest.read_manifest(tmp_path)


def test_the_evaluation_identifies_weights_by_the_same_hash(tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer.json", "optimizer.pt"):
        (tmp_path / name).write_text("{}")
    before = manifest.weights_sha256(tmp_path)
    assert model_identity(str(tmp_path), "main")["sha256"] == before
    (tmp_path / "optimizer.pt").write_text("other")
    assert manifest.weights_sha256(tmp_path) == before
    (tmp_path / "config.json").write_text("other")
    assert manifest.weights_sha256(tmp_path) != before
