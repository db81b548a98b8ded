"""Publish a checkpoint folder on the Hub, all of it or nothing: `granulon-publish`.

    granulon-publish --folder checkpoint --repo_id jinlab/granulon-qwen1.5b
    granulon-publish --folder checkpoint --repo_id jinlab/granulon-qwen1.5b --space jinlab/granulon

The files are uploaded to a branch. A new process loads the model from there and must get the logits of the local
folder. Then one commit brings the same files to `main`, with a tag: readers see the old version or the new one. After
a failure run the same command again; files that the Hub has are not uploaded twice.
"""

import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, SpaceCard, SpaceInfo
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from safetensors import safe_open
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from .assemble import assemble
from .licences import terms
from .manifest import read_manifest
from .package import ADAPTER, ADAPTER_CONFIG, MODEL, TRAINABLE_ONLY, Package, make_package, matches, size_of
from .text import first_line

SPACE = Path(__file__).resolve().parent.parent / "space"
SPACE_FILES = ["README.md", "requirements.txt", "*.py", "*.js", "*.css", "examples/*.jpg"]  # uploaded to a Space
NOTICE_SETTING, LLAMA_LINE = "MODEL_NOTICE", "Built with Llama"  # variable of the Space, and its value for Llama
TIMEOUT = 3600  # seconds for a new process to download, load and answer
HTTP_LIBRARIES = "httpx", "httpx2", "httpcore", "httpcore2"  # which one depends on the version of huggingface_hub


@dataclass
class PublishArguments:
    folder: str = HfArg(help="folder of a checkpoint or of a LoRA adapter")
    repo_id: str = HfArg(help="repository on the Hub, OWNER/NAME")
    revision: str = HfArg(default=f"v{version('granulon')}", help="tag to set; a tag never changes")
    private: bool = HfArg(default=False, help="create new repositories as private ones")
    create_pr: bool = HfArg(default=False, help="open a pull request and change nothing else")
    base_model: str | None = HfArg(default=None, help="model on the Hub below the adapter, OWNER/NAME@REVISION")
    trainable_only: bool = HfArg(default=False, help="publish the trained parts alone")
    space: str | None = HfArg(default=None, help="also publish the demo for this model as this Space")
    results: str | None = HfArg(default=None, help="folder of granulon-evaluate, with results for the card")
    dry_run: bool = HfArg(default=False, help="print what would be uploaded, and upload nothing")
    licences: list[str] = HfArg(default_factory=list, help="undeclared licences: vision=..., text=..., DATA=...")
    outputs_of: list[str] = HfArg(default_factory=list, help="models on whose outputs this one was trained")

    @property
    def kind(self) -> str:
        """A folder with an adapter and no model is published as an adapter."""
        folder = Path(self.folder)
        if (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists():
            return ADAPTER
        return TRAINABLE_ONLY if self.trainable_only else MODEL


class PublishError(ValueError):
    """Publishing stopped; the message says where, and what to do."""


def main():
    (arguments,) = HfArgumentParser(PublishArguments, description=__doc__).parse_args_into_dataclasses()
    try:
        run(arguments, HfApi())
    except (OSError, ValueError) as error:
        sys.exit(f"granulon-publish: {error}")


def run(arguments: PublishArguments, api: HfApi):
    """Publish as the options say; raises `ValueError` with the reason and the remedy."""
    folder, repo_id, revision = Path(arguments.folder), arguments.repo_id, arguments.revision
    if not folder.is_dir():
        raise PublishError(f"{folder} is not a folder; give a checkpoint")
    if arguments.space:
        _check_space(arguments)
    if wrong := [entry for entry in arguments.licences if "=" not in entry]:
        raise PublishError(f"--licences takes NAME=LICENCE, found {wrong}")
    licences = dict(entry.rsplit("=", 1) for entry in arguments.licences)
    required = terms(folder, repo_id, licences, arguments.outputs_of)
    options = (arguments.base_model, arguments.results)
    package = make_package(folder, arguments.kind, required, repo_id, revision, *options)
    warnings = list(required.warnings)
    if arguments.space and arguments.private:
        reason = f"the Space {arguments.space} needs a token to read {repo_id}, which is private"
        warnings.append(f"{reason}: store one in the Space's settings as the secret HF_TOKEN")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if arguments.dry_run:
        print(_overview(package, arguments))
        return
    print(f"published {publish(package, repo_id, api, folder, revision, arguments.private, arguments.create_pr)}")
    if arguments.space:
        settings = {"MODEL_ID": repo_id, "MODEL_REVISION": revision}
        if any(LLAMA_LINE in line for line in required.credits):  # Llama's licence requires it to be visible
            settings[NOTICE_SETTING] = LLAMA_LINE
        print(f"published {publish_space(arguments.space, settings, api, arguments.private)}")


def check_before_training(arguments: PublishArguments, api: HfApi):
    """
    Raise `ValueError` now for what would stop the publishing of a model that is yet to be trained.

    That is: no valid token, a tag that exists, and, where `folder` is the local model it starts from, its licences.
    """
    repo_id, revision = arguments.repo_id, arguments.revision
    with translate_hub_errors(repo_id):
        api.whoami()
        if api.repo_exists(repo_id) and api.revision_exists(repo_id, revision):
            raise PublishError(f"{repo_id} has a tag {revision}, and tags never change: choose another revision")
    if Path(arguments.folder).is_dir():
        terms(Path(arguments.folder), repo_id)


def _overview(package: Package, arguments: PublishArguments) -> str:
    """What would be uploaded, and where."""
    target = "a pull request" if arguments.create_pr else f"main, tagged {arguments.revision}"
    sizes = {path: size_of(content) for path, content in sorted(package.files.items())}
    megabytes = sum(sizes.values()) / 1e6
    lines = [f"{package.kind} to {arguments.repo_id}, {target}; {len(sizes)} files, {megabytes:.1f} MB:"]
    lines += [f"  {size:>14,}  {path}" for path, size in sizes.items()]
    if arguments.space:
        lines += [f"Space to {arguments.space}:", *(f"  {name}" for name in space_files())]
    return "\n".join(lines)


def publish(
    package: Package, repo_id: str, api: HfApi, folder: Path, revision: str, private=False, create_pr=False
) -> str:
    """
    Upload a package to a branch, verify it, commit it to `main` with a tag, and return the address.

    Args:
        folder: source of the package; the model on the Hub must have its logits.
        revision: the tag. With `create_pr` only a pull request is opened.

    Raises:
        PublishError: the Hub refuses or cannot be reached, the published model differs, the tag has other files, or
            there was another commit in the meantime.
    """
    if package.base:
        with translate_hub_errors(package.base[0]):
            api.auth_check(package.base[0])
    with translate_hub_errors(repo_id):
        start = _repository(repo_id, api, private)
        is_published = same_files(package, repo_id, start, api)
        if create_pr:
            main = f"{api.endpoint}/{repo_id}/tree/main"
            return main if is_published else _pull_request(package, repo_id, api, folder)
        tagged = api.revision_exists(repo_id, revision)
        if tagged and not same_files(package, repo_id, revision, api):
            found = f"{repo_id} has a tag {revision} with other files"
            raise PublishError(f"{found}, and tags never change: choose another --revision")
        commit = start if is_published else _stage_verify_promote(package, repo_id, start, api, folder)
        if not tagged:
            api.create_tag(repo_id, tag=revision, revision=commit)
        if any(ref.name == package.branch for ref in api.list_repo_refs(repo_id).branches):  # also of an earlier run
            api.delete_branch(repo_id, branch=package.branch)
    return f"{api.endpoint}/{repo_id}/tree/{revision}"


def _repository(repo_id: str, api: HfApi, private: bool) -> str:
    """The commit of `main`, in a repository that is created if it does not exist."""
    try:
        found = api.model_info(repo_id)
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError):
            raise
        api.create_repo(repo_id, private=private, exist_ok=True)
        found = api.model_info(repo_id)
    _check_private(repo_id, found, private)
    return found.sha


def _check_private(repo_id: str, found: ModelInfo | SpaceInfo, private: bool):
    if private and not found.private:
        remedy = "Make it private in its settings on the Hub, or choose another name"
        raise PublishError(f"{repo_id} exists and is public: --private applies to new repositories only. {remedy}")


def _stage_verify_promote(package: Package, repo_id: str, start: str, api: HfApi, folder: Path) -> str:
    api.create_branch(repo_id, branch=package.branch, exist_ok=True)
    staged = _commit(package, repo_id, api, revision=package.branch).oid
    _verify(package, repo_id, staged, api, folder)
    # The same files again, without an upload: one commit, refused by the Hub if `main` is no longer at `start`.
    commit = _commit(package, repo_id, api, revision="main", parent_commit=start).oid
    if not same_files(package, repo_id, commit, api):
        raise PublishError(f"{repo_id} at {commit} is not what was committed; run the same command again")
    return commit


def _pull_request(package: Package, repo_id: str, api: HfApi, folder: Path) -> str:
    refs = api.list_repo_refs(repo_id, include_pull_requests=True)
    for ref in refs.pull_requests or []:
        if same_files(package, repo_id, ref.target_commit, api):  # opened by an earlier run
            _verify(package, repo_id, ref.target_commit, api, folder)
            return f"{api.endpoint}/{repo_id}/discussions/{ref.name.rpartition('/')[2]}"
    commit = _commit(package, repo_id, api, create_pr=True)
    _verify(package, repo_id, commit.oid, api, folder)
    return commit.pr_url


def _commit(package: Package, repo_id: str, api: HfApi, **options):
    added = [CommitOperationAdd(path, content) for path, content in sorted(package.files.items())]
    paths = _hashes_on_hub(repo_id, options.get("revision", "main"), api)
    removed = [CommitOperationDelete(path) for path in package.stale(paths)]
    message = f"Granulon {package.sha[:12]}"
    return api.create_commit(repo_id, [*added, *removed], commit_message=message, **options)


def same_files(package: Package, repo_id: str, revision: str, api: HfApi) -> bool:
    """Whether a revision has the package's files, byte for byte, and none of an earlier version besides."""
    found = _hashes_on_hub(repo_id, revision, api)
    return not package.stale(found) and all(found.get(path) in hashes for path, hashes in package.hashes.items())


def _hashes_on_hub(repo_id: str, revision: str, api: HfApi) -> dict[str, str]:
    """The paths of a revision's files, and the SHA-256 (large files) or git hash of each."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    files = (entry for entry in tree if isinstance(entry, RepoFile))
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def _verify(package: Package, repo_id: str, commit: str, api: HfApi, folder: Path):
    """Check that a commit has all files, and that a new process gets the local logits and answer from it."""
    if not same_files(package, repo_id, commit, api):
        raise PublishError(f"{repo_id} at {commit} is not what was uploaded; run the same command again")
    local_folder = str(folder.resolve())  # the new process has another working directory
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if package.kind == ADAPTER:
            sources = [(*package.base, local_folder), (*package.base, repo_id, commit)]
        elif package.kind == TRAINABLE_ONLY:
            local = local_folder if (folder / "model.safetensors").is_file() else str(work / "local")
            if local != local_folder:
                assemble(None, None, local, trained=folder)
            sources = [(local,), (assemble_published(folder, repo_id, commit, work, api),)]
        else:
            sources = [(local_folder,), (repo_id, commit)]
        (local, answer), (published, published_answer) = (cold_load(work, api, *source) for source in sources)
    if not torch.equal(local, published) or answer != published_answer:
        answers = f"it answers {published_answer!r} instead of {answer!r}"
        raise PublishError(f"{repo_id} at {commit} differs from {folder}: {answers}; main is unchanged")


def assemble_published(folder: Path, repo_id: str, commit: str, work: Path, api: HfApi) -> str:
    """Rebuild the full model from the uploaded weights with the card's command, in a new process; its folder."""
    manifest, output = read_manifest(folder), str(work / "assembled")
    parts = {part: "{source}@{revision}".format(**manifest[part]) for part in ("vision", "text")}
    pinned = [word for part in parts if manifest[part]["revision"] for word in (f"--{part}", parts[part])]
    command = ["-m", "granulon.hub.assemble", *pinned, "--output", output]
    failure = f"{repo_id} at {commit} cannot be assembled with {' and '.join(parts.values())}"
    _run_in_new_process(failure, [*command, "--trained", f"{repo_id}@{commit}"], work, api)
    return output


def cold_load(work: Path, api: HfApi, *source: str) -> tuple[torch.Tensor, str]:
    """Logits and answer of a model in a new process; `source` as in cold_load.py."""
    output = work / "logits.safetensors"
    script = str(Path(__file__).with_name("cold_load.py"))
    failure = f"{' at '.join(source[2:] or source[:2])} does not load"
    _run_in_new_process(failure, [script, str(output), *source], work, api)
    with safe_open(output, "pt") as stored:
        return stored.get_tensor("logits"), stored.metadata()["answer"]


def _run_in_new_process(failure: str, command: list[str], work: Path, api: HfApi):
    """Run Python with empty caches of its own; raises `PublishError`, which begins with `failure`, if it fails."""
    token = {"HF_TOKEN": api.token} if isinstance(api.token, str) else {}
    environment = {
        **os.environ, **token, "HF_ENDPOINT": api.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(work / "hub"),
        "HF_MODULES_CACHE": str(work / "modules"),
    }  # fmt: skip
    options = {"env": environment, "cwd": work, "capture_output": True, "text": True, "timeout": TIMEOUT}
    try:
        done = subprocess.run([sys.executable, *command], **options)
    except subprocess.TimeoutExpired as error:
        limit = f"in a new process within {TIMEOUT // 60} minutes"
        raise PublishError(f"{failure} {limit}; main is unchanged, run the same command again") from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise PublishError(f"{failure} in a new process: {last[0]}; main is unchanged")


def _check_space(arguments: PublishArguments):
    """Raise `PublishError` if the Space could not load the published model, or is not in this installation."""
    if arguments.create_pr:
        raise PublishError("--space loads a tag, and a pull request gets none: omit --create_pr or --space")
    if arguments.kind != MODEL:
        found = f"the folder is published as {arguments.kind!r}"
        raise PublishError(f"--space loads a whole model, but {found}: publish the merged or assembled model with it")
    space_files()


def space_files() -> list[str]:
    """Names of the files of a Space, without others that lie in its folder."""
    if not (SPACE / "app.py").is_file():
        raise PublishError(f"there is no Space in {SPACE}: publish it from a clone of the repository")
    names = (str(file.relative_to(SPACE)) for file in sorted(SPACE.rglob("*")) if file.is_file())
    return [name for name in names if matches(name, SPACE_FILES)]


def publish_space(space_id: str, settings: dict[str, str], api: HfApi, private: bool = False) -> str:
    """Upload the Space in one commit and set its variables; its address. Raises `PublishError` as `publish` does."""
    card = SpaceCard.load(SPACE / "README.md")
    card.data.models = [settings["MODEL_ID"]]
    contents = {name: str(SPACE / name) for name in space_files()} | {"README.md": str(card).encode()}
    with translate_hub_errors(space_id, "choose a Space of your own with --space"):
        api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        _check_private(space_id, api.space_info(space_id), private)
        current = {key: variable.value for key, variable in api.get_space_variables(space_id).items()}
        for key, value in settings.items():
            if current.get(key) != value:
                api.add_space_variable(space_id, key, value)
        if NOTICE_SETTING in current and NOTICE_SETTING not in settings:  # of another model before
            api.delete_space_variable(space_id, NOTICE_SETTING)
        added = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(space_id, added, commit_message="The Space", repo_type="space")
    return f"{api.endpoint}/spaces/{space_id}"


@contextmanager
def translate_hub_errors(repo_id: str, alternative="choose a name of your own, or use --create_pr"):
    """Turn errors of the Hub client into `PublishError` with a remedy; `alternative` is one for a missing right."""
    try:
        yield
    except PublishError:
        raise
    except Exception as error:
        causes = [error]  # the client wraps errors of an upload
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        for cause in causes:
            if isinstance(cause, HfHubHTTPError):
                raise PublishError(_refusal(repo_id, cause, alternative)) from error
            if isinstance(cause, ConnectionError) or type(cause).__module__.partition(".")[0] in HTTP_LIBRARIES:
                broken = f"the connection to the Hub broke ({first_line(cause)})"
                raise PublishError(f"{broken}; run the same command again, uploaded files are kept") from error
        raise


def _refusal(repo_id: str, error: HfHubHTTPError, alternative: str) -> str:
    status = error.response.status_code
    remedy = {
        401: "there is no valid token: log in with `hf auth login` and a token that may write",
        403: f"you may not write there: {alternative}",
        404: "it does not exist, or the token may not read it",
        409: "another operation is in progress: run the same command again",
        412: "there was another commit in the meantime: look at it, then run the same command again",
    }.get(status, "run the same command again; uploaded files are kept")
    if isinstance(error, GatedRepoError):
        remedy = "it is gated: accept its conditions on the Hub with the account of your token"
    return f"the Hub refuses {repo_id} ({status}: {first_line(error.server_message or error)}); {remedy}"


if __name__ == "__main__":
    main()
