"""Publish a checkpoint folder on the Hub, all of it or nothing: `granulon-publish`.

    granulon-publish --folder checkpoint --repo_id jinlab/granulon-qwen1.5b
    granulon-publish --folder checkpoint --repo_id jinlab/granulon-qwen1.5b --space jinlab/granulon

The files are uploaded to a branch. A new process loads the model from there and must get the logits of the local
folder. Then one commit brings the same files to `main`, with a tag: readers see the old version or the new one. After
a failure run the same command again; files that the Hub has are not uploaded twice.

Files on the Hub that no release of ours wrote, or that were changed since, are neither overwritten nor deleted: they
stop the command, unless `--replace` is given.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, SpaceCard, SpaceInfo
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from .assemble import assemble
from .changes import Changes, PublishError, hashes_on_hub, released_hashes
from .licences import terms
from .manifest import read_manifest
from .package import (
    ADAPTER,
    ADAPTER_CONFIG,
    MODEL,
    TRAINABLE_ONLY,
    Package,
    check_no_links,
    make_package,
    matches,
    size_of,
)
from .text import first_line

SPACE = Path(__file__).resolve().parent.parent / "space"
SPACE_FILES = ["README.md", "requirements.txt", "*.py", "*.js", "*.css", "examples/*.jpg"]  # uploaded to a Space
NOTICE_SETTING, LLAMA_LINE = "MODEL_NOTICE", "Built with Llama"  # variable of the Space, and its value for Llama
TAG = re.compile(r"(?!.*(\.\.|//|@\{|\.lock$))[\w][\w.+/-]*(?<![./])")  # what git takes, and is easily typed
BRANCHES = ("main", "master", "HEAD")
HEARTBEAT = 30  # seconds between two lines of a long check
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
    replace: bool = HfArg(default=False, help="overwrite and delete files that no release wrote; lists them")
    dry_run: bool = HfArg(default=False, help="print what would change on the Hub, and change nothing")
    licences: list[str] = HfArg(default_factory=list, help="undeclared licences: vision=..., text=..., DATA=...")
    outputs_of: list[str] = HfArg(default_factory=list, help="models on whose outputs this one was trained")

    @property
    def kind(self) -> str:
        """A folder with an adapter and no model is published as an adapter."""
        folder = Path(self.folder)
        if (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists():
            return ADAPTER
        return TRAINABLE_ONLY if self.trainable_only else MODEL


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
    if wrong := [entry for entry in arguments.licences if "=" not in entry]:
        raise PublishError(f"--licences takes NAME=LICENCE, found {wrong}")
    check_names(arguments)
    if arguments.space:
        _check_space(arguments)
    if not arguments.dry_run:
        _check_owner(arguments, api)
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
        print(_overview(package, arguments, api))
        return
    address = publish(
        package, repo_id, api, folder, revision, arguments.private, arguments.create_pr, arguments.replace
    )
    print(f"published {address}")
    if arguments.space:
        settings = {"MODEL_ID": repo_id, "MODEL_REVISION": revision}
        if any(LLAMA_LINE in line for line in required.credits):  # Llama's licence requires it to be visible
            settings[NOTICE_SETTING] = LLAMA_LINE
        print(f"published {publish_space(arguments.space, settings, api, arguments.private, arguments.replace)}")


def check_names(arguments: PublishArguments):
    """Raise `PublishError` for a repository or tag whose name the Hub would not take."""
    for option, name in (("repo_id", arguments.repo_id), ("space", arguments.space)):
        if name is None:
            continue
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise PublishError(f"--{option} {name}: {first_line(error)}") from error
        if name.count("/") != 1:
            raise PublishError(f"--{option} is {name}; expected OWNER/NAME")
    if not TAG.fullmatch(arguments.revision) or arguments.revision in BRANCHES:
        raise PublishError(f"--revision {arguments.revision!r} cannot be a tag; take a version such as v1.0.0")


def _check_owner(arguments: PublishArguments, api: HfApi):
    """Raise `PublishError` unless the token's account is, or belongs to, the owner of what is written."""
    with translate_hub_errors(arguments.repo_id):
        try:
            user = api.whoami()
        except (LocalTokenNotFoundError, ValueError) as error:  # there is none, or the client may not use it
            raise PublishError("no token (401): log in with `hf auth login` and a token that may write") from error
    own = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    alternatives = {arguments.repo_id: "choose a name of your own, or use --create_pr"}
    if arguments.space:
        alternatives[arguments.space] = "choose a Space of your own with --space"
    for name, alternative in alternatives.items():
        if name.partition("/")[0] not in own and not arguments.create_pr:
            raise PublishError(f"the token is of {', '.join(own)}, who may not write to {name}: {alternative}")


def check_before_training(arguments: PublishArguments, api: HfApi):
    """
    Raise `ValueError` now for what would stop the publishing of a model that is yet to be trained.

    That is: names that the Hub does not take, no valid token or one of another owner, a tag that exists, and, where
    `folder` is the local model it starts from, its licences.
    """
    repo_id, revision = arguments.repo_id, arguments.revision
    check_names(arguments)
    _check_owner(arguments, api)
    with translate_hub_errors(repo_id):
        if api.repo_exists(repo_id) and api.revision_exists(repo_id, revision):
            raise PublishError(f"{repo_id} has a tag {revision}, and tags never change: choose another revision")
    if Path(arguments.folder).is_dir():
        terms(Path(arguments.folder), repo_id)


def changes_of(package: Package, repo_id: str, api: HfApi) -> Changes:
    """What publishing would do to `main`."""
    found = hashes_on_hub(repo_id, "main", api)
    return Changes.of(package.hashes, package.stale(found), found, released_hashes(repo_id, found, api))


def _overview(package: Package, arguments: PublishArguments, api: HfApi) -> str:
    """What would be uploaded, and where, and what that would do to what is there."""
    target = "a pull request" if arguments.create_pr else f"main, tagged {arguments.revision}"
    sizes = {path: size_of(content) for path, content in package.files.items()}
    megabytes = sum(sizes.values()) / 1e6
    lines = [f"{package.kind} to {arguments.repo_id}, {target}; {len(sizes)} files, {megabytes:.1f} MB"]
    lines += _compared(arguments.repo_id, api, sizes, lambda: changes_of(package, arguments.repo_id, api))
    if arguments.space:
        contents = space_contents({"MODEL_ID": arguments.repo_id})
        lines += [f"Space to {arguments.space}"]
        sizes = {path: size_of(content) for path, content in contents.files.items()}
        lines += _compared(arguments.space, api, sizes, lambda: space_changes(contents, arguments.space, api))
    return "\n".join([*lines, "+ added, ~ changed, - deleted, = as it is, ! not written by a release"])


def _compared(repo_id: str, api: HfApi, sizes: dict[str, int], compare) -> list[str]:
    """The lines of an overview; without a repository, or without the Hub, all files count as new."""
    new = Changes(sorted(sizes), [], [], [])
    try:
        with translate_hub_errors(repo_id):
            changes, note = compare(), "which exists"
    except PublishError as error:
        missing = isinstance(error.__cause__, RepositoryNotFoundError)
        changes, note = new, "which would be created" if missing else f"not compared: {error}"
    return [f"  ({repo_id}, {note})", *changes.lines(sizes)]


def publish(
    package: Package,
    repo_id: str,
    api: HfApi,
    folder: Path,
    revision: str,
    private: bool = False,
    create_pr: bool = False,
    replace: bool = False,
) -> str:
    """
    Upload a package to a branch, verify it, commit it to `main` with a tag, and return the address.

    Args:
        folder: source of the package; the model on the Hub must have its logits.
        revision: the tag. With `create_pr` only a pull request is opened.
        replace: also overwrite and delete files that no release wrote.

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
        if not is_published:
            changes_of(package, repo_id, api).check(repo_id, replace)
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
    _say(f"uploading {len(package.files)} files to a branch of {repo_id}")
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
    paths = hashes_on_hub(repo_id, options.get("revision", "main"), api)
    removed = [CommitOperationDelete(path) for path in package.stale(paths)]
    message = f"Granulon {package.sha[:12]}"
    return api.create_commit(repo_id, [*added, *removed], commit_message=message, **options)


def same_files(package: Package, repo_id: str, revision: str, api: HfApi) -> bool:
    """Whether a revision has the package's files, byte for byte, and none of an earlier version besides."""
    found = hashes_on_hub(repo_id, revision, api)
    return not package.stale(found) and all(found.get(path) in hashes for path, hashes in package.hashes.items())


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
    _say(f"loading {' at '.join(source)} in a new process, whose answer is compared")
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
    options = {"env": environment, "cwd": work, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    start = time.monotonic()
    with subprocess.Popen([sys.executable, *command], **options) as process:
        while True:
            try:
                errors = process.communicate(timeout=HEARTBEAT)[1]
                break
            except subprocess.TimeoutExpired as error:
                passed = time.monotonic() - start
                if passed > TIMEOUT:
                    process.kill()
                    limit = f"in a new process within {TIMEOUT // 60} minutes"
                    raise PublishError(f"{failure} {limit}; main is unchanged, run the same command again") from error
                _say(f"{passed:.0f} s")
    if process.returncode:
        last = errors.strip().splitlines()[-1:] or ["no message"]
        raise PublishError(f"{failure} in a new process: {last[0]}; main is unchanged")


def _say(step: str):
    print(f"granulon-publish: {step} ...", file=sys.stderr, flush=True)


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


def space_contents(settings: dict[str, str]) -> Package:
    """The files of the Space; its card names the model of the settings."""
    names = space_files()
    check_no_links(SPACE, names)
    card = SpaceCard.load(SPACE / "README.md")
    card.data.models = [settings["MODEL_ID"]]
    return Package("space", {name: SPACE / name for name in names} | {"README.md": str(card).encode()})


def space_changes(contents: Package, space_id: str, api: HfApi) -> Changes:
    """What publishing would do to a Space. Files that the Hub itself wrote into a new one may be replaced."""
    found = hashes_on_hub(space_id, "main", api, "space")
    released = released_hashes(space_id, found, api, "space")
    if set(found) <= {".gitattributes", "README.md"}:
        released = {path: [value] for path, value in found.items()}
    stale = [path for path in released if path in found and path not in contents.files]
    return Changes.of(contents.hashes, stale, found, released)


def publish_space(
    space_id: str, settings: dict[str, str], api: HfApi, private: bool = False, replace: bool = False
) -> str:
    """Upload the Space in one commit and set its variables; its address. Raises `PublishError` as `publish` does."""
    contents = space_contents(settings)
    with translate_hub_errors(space_id, "choose a Space of your own with --space"):
        api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        _check_private(space_id, api.space_info(space_id), private)
        changes = space_changes(contents, space_id, api)
        changes.check(space_id, replace)
        current = {key: variable.value for key, variable in api.get_space_variables(space_id).items()}
        for key, value in settings.items():
            if current.get(key) != value:
                api.add_space_variable(space_id, key, value)
        if NOTICE_SETTING in current and NOTICE_SETTING not in settings:  # of another model before
            api.delete_space_variable(space_id, NOTICE_SETTING)
        operations = [CommitOperationAdd(name, content) for name, content in contents.files.items()]
        operations += [CommitOperationDelete(name) for name in changes.deleted]
        api.create_commit(space_id, operations, commit_message="The Space", repo_type="space")
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
