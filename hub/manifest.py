"""Which code made a checkpoint or a result."""

import json
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

ROOT = Path(__file__).parents[1]


def versions(*libraries: str) -> dict[str, str | None]:
    """The version of each installed library (None of one that is not), and `granulon_commit`: see `git_commit`."""
    found = {}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {**found, "granulon_commit": git_commit()}


def git_commit() -> str | None:
    """The commit of this package, "-dirty" behind it where files were changed; None where it came from an index."""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or a folder of somebody else's
            return None
    origin = json.loads(distribution("granulon").read_text("direct_url.json") or "{}")
    return origin.get("vcs_info", {}).get("commit_id")
