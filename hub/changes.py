"""What publishing does to the files of a repository, and which of them no release wrote."""

import json
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from .package import RELEASE


class PublishError(ValueError):
    """Publishing stopped; the message says where, and what to do."""


@dataclass
class Changes:
    """What publishing files does to those of a repository: paths, sorted."""

    added: list[str]
    changed: list[str]
    deleted: list[str]
    foreign: list[str]  # those changed or deleted that no release wrote as they are

    @classmethod
    def of(cls, hashes: dict, stale: Iterable[str], found: dict[str, str], released: dict) -> "Changes":
        """
        Args:
            hashes: of the files to publish, each with all its hashes.
            stale: paths of the repository to delete.
            found: the hash of each of the repository's files.
            released: the hashes that the repository's last release recorded.
        """
        changed = [path for path, own in hashes.items() if path in found and found[path] not in own]
        touched = {*changed, *stale} - {RELEASE}
        foreign = [path for path in touched if found[path] not in released.get(path, ())]
        return cls(sorted(hashes.keys() - found.keys()), sorted(changed), sorted(stale), sorted(foreign))

    def check(self, repo_id: str, replace: bool):
        """Raise `PublishError` for foreign files; with `replace` list them."""
        if not self.foreign:
            return
        names = ", ".join(self.foreign[:8]) + (f" and {len(self.foreign) - 8} more" if len(self.foreign) > 8 else "")
        if not replace:
            found = f"{repo_id} has files that no release of this command wrote, or that were changed since: {names}"
            raise PublishError(f"{found}. They would be overwritten or deleted; choose another name, or use --replace")
        print(f"replacing in {repo_id}: {', '.join(self.foreign)}", file=sys.stderr)

    def lines(self, sizes: dict[str, int]) -> list[str]:
        """A line for each file: + added, ~ changed, - deleted, = as it is; ! if no release wrote it."""
        marks = dict.fromkeys(sizes, "=") | dict.fromkeys(self.added, "+") | dict.fromkeys(self.changed, "~")
        marks |= dict.fromkeys(self.deleted, "-")
        foreign = dict.fromkeys(self.foreign, "!")
        return [
            f"  {mark}{foreign.get(path, ' ')} {sizes.get(path, 0):>14,}  {path}"
            for path, mark in sorted(marks.items())
        ]


def released_hashes(repo_id: str, found: dict[str, str], api: HfApi, kind: str = "model") -> dict[str, list[str]]:
    """What the last release recorded in a repository; nothing where there was none."""
    if RELEASE not in found:
        return {}
    with tempfile.TemporaryDirectory() as cache:
        file = api.hf_hub_download(repo_id, RELEASE, repo_type=kind, revision="main", cache_dir=cache)
        try:
            return dict(json.loads(Path(file).read_text(encoding="utf-8"))["files"])
        except (ValueError, KeyError, TypeError):  # somebody wrote something else
            return {}


def hashes_on_hub(repo_id: str, revision: str, api: HfApi, kind: str = "model") -> dict[str, str]:
    """The paths of a revision's files, and the SHA-256 (large files) or git hash of each."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=kind)
    files = (entry for entry in tree if isinstance(entry, RepoFile))
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}
