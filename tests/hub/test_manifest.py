"""What a checkpoint or a result says of the code that made it."""

import subprocess

import transformers

from granulon.hub import manifest


def git(folder, *command):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *identity, *command], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_commit_of_a_clone_is_told_and_that_it_was_changed(tmp_path, monkeypatch):
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


def test_an_installed_package_without_a_clone_has_no_commit_and_takes_nobody_elses(tmp_path, monkeypatch):
    git(tmp_path, "init", "--quiet")  # a folder of the user's, with an environment in it
    monkeypatch.setattr(manifest, "ROOT", tmp_path / "venv" / "site-packages")
    assert manifest.git_commit() is None


def test_versions_are_those_of_the_libraries_and_an_absent_one_is_told_as_none():
    found = manifest.versions("transformers", "no-such-library")
    assert found["transformers"] == transformers.__version__
    assert found["no-such-library"] is None
    assert "granulon_commit" in found
