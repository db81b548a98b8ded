"""granulon_manifest.json: the sources of a checkpoint's weights, its training, and the code that made it."""

import hashlib
import json
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from .files import sha256_of, write_atomically

ROOT = Path(__file__).parents[1]
MANIFEST = "granulon_manifest.json"
# Files of a model that its licence requires beside the weights.
LICENCE_FILES = ["LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"]
# The files that decide what a model answers.
ANSWER_FILES = ("*.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "processor_config.json")


def read_manifest(folder: str | Path) -> dict:
    """
    The manifest of a checkpoint: "vision" and "text" (source, revision, licence), "versions", "training".

    Raises:
        ValueError: there is no manifest, or it lacks one of the two sources.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        missing = f"{folder} has no {MANIFEST}, which names the sources and licences of its weights"
        raise ValueError(f"{missing}; use a folder that granulon-assemble or granulon-train wrote")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not all(isinstance(manifest.get(part), dict) for part in ("vision", "text")):
        raise ValueError(f"{path} does not name the vision tower and the language model; restore the file")
    return manifest


def write_manifest(folder: str | Path, manifest: dict):
    """Write the manifest of a checkpoint, in place of one that is there."""
    write_atomically(Path(folder) / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def append_training_record(folder: str | Path, libraries: tuple[str, ...], **record):
    """
    Add an entry (stage, recipe, settings, rows, ..., and the versions of `libraries`) to the manifest's list
    "training"; a folder without manifest gets one with this list alone.
    """
    path = Path(folder) / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    manifest["training"] = [*manifest.get("training", []), {**record, "versions": versions(*libraries)}]
    write_manifest(folder, manifest)


def weights_sha256(folder: str | Path) -> str:
    """One hash of `ANSWER_FILES`, by which `granulon-evaluate` identifies a checkpoint folder."""
    combined = hashlib.sha256()
    for file in sorted({file for pattern in ANSWER_FILES for file in Path(folder).glob(pattern)}):
        combined.update(f"{file.name} {sha256_of(file)}\n".encode())
    return combined.hexdigest()


def versions(*libraries: str) -> dict[str, str | None]:
    """The version of each library (None if it is not installed), and `granulon_commit`: see `git_commit`."""
    found = {}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {**found, "granulon_commit": git_commit()}


def git_commit() -> str | None:
    """The commit of this package, with "-dirty" appended if files were changed; None if it came from an index."""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # git is not installed, or does not trust the folder's owner
            return None
    origin = json.loads(distribution("granulon").read_text("direct_url.json") or "{}")
    return origin.get("vcs_info", {}).get("commit_id")
