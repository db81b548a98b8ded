"""`granulon-publish`: a checkpoint folder goes to the Hub, whole or not at all.

    granulon-publish --folder checkpoint --repo_id jinlab/granulon-qwen1.5b
    granulon-publish --folder checkpoint --repo_id jinlab/granulon-qwen1.5b --space jinlab/granulon

The files go to a branch first. From there a fresh process loads them as a stranger would and has to get the logits of
the local folder. Then one commit puts the same files on `main`, and a tag on it: readers see the old state or the new
one. After a failure the same command goes on; what the Hub has is not uploaded again.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, SpaceCard, SpaceInfo
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import safe_open
from transformers import HfArgumentParser

from .licences import Terms, read_manifest, terms
from .package import KINDS, Package, make_package, matches

SPACE = Path(__file__).resolve().parent.parent / "space"
# Of what may lie in that folder, what a stranger's browser is to be served by.
SPACE_FILES = ["README.md", "requirements.txt", "*.py", "*.js", "*.css", "examples/*.png"]
NOTICE_SETTING, LLAMA_LINE = "MODEL_NOTICE", "Built with Llama"  # the setting of the Space that shows the line
PATIENCE = 3600  # seconds for a fresh process to fetch, load and answer


@dataclass
class PublishArguments:
    folder: str = field(metadata={"help": "the checkpoint, or with --adapter the adapter"})
    repo_id: str = field(metadata={"help": "name of the repository on the Hub, owner/name"})
    revision: str = field(
        default=f"v{version('granulon')}", metadata={"help": "tag to set; what it names never changes afterwards"}
    )
    private: bool = field(default=False, metadata={"help": "make the repository private, if it is new"})
    create_pr: bool = field(default=False, metadata={"help": "open a pull request instead, and leave it open"})
    adapter: bool = field(default=False, metadata={"help": "the folder holds an adapter (LoRA)"})
    base_model: str | None = field(
        default=None, metadata={"help": "of an adapter: its base on the Hub, OWNER/NAME@REVISION"}
    )
    trainable_only: bool = field(
        default=False, metadata={"help": "projector, gains and controller alone, without anybody else's weights"}
    )
    space: str | None = field(
        default=None, metadata={"help": "also upload the Space, for this model, under this name"}
    )
    results: str | None = field(
        default=None, metadata={"help": "what granulon-evaluate --output wrote about this folder, for the card"}
    )
    dry_run: bool = field(default=False, metadata={"help": "print what would go where; send nothing"})
    vision_licence: str | None = field(default=None, metadata={"help": "where the encoder declares none"})
    text_licence: str | None = field(default=None, metadata={"help": "where the language model declares none"})
    data_licence: list[str] = field(default_factory=list, metadata={"help": "of training data: SOURCE=LICENCE ..."})
    outputs_of: list[str] = field(default_factory=list, metadata={"help": "models on whose outputs it was trained"})

    @property
    def kind(self) -> str:
        return KINDS[1] if self.adapter else KINDS[2] if self.trainable_only else KINDS[0]


class PublishError(ValueError):
    """Publishing stopped; the message says where, and what to do."""


def main():
    (arguments,) = HfArgumentParser(PublishArguments, description=__doc__).parse_args_into_dataclasses()
    try:
        run(arguments, HfApi())
    except (OSError, ValueError) as error:
        sys.exit(f"granulon-publish: {error}")


def run(arguments: PublishArguments, api: HfApi):
    """Publish as the command line says; raises `ValueError` with a sentence."""
    folder = Path(arguments.folder)
    if not folder.is_dir():
        raise PublishError(f"{folder} is no folder; give a checkpoint")
    if arguments.space:
        _check_space(arguments)
    stated = {"vision": arguments.vision_licence, "text": arguments.text_licence}
    agreed = terms(
        folder,
        arguments.repo_id,
        stated={part: licence for part, licence in stated.items() if licence},
        data_licences=_pairs(arguments.data_licence),
        outputs_of=arguments.outputs_of,
    )
    package = make_package(
        folder,
        arguments.kind,
        agreed,
        arguments.repo_id,
        arguments.revision,
        base=arguments.base_model,
        results=arguments.results,
    )
    for warning in [*agreed.warnings, *_space_warnings(arguments)]:
        print(f"warning: {warning}", file=sys.stderr)
    if arguments.dry_run:
        print(described(package, arguments))
        return
    address = publish(
        package, arguments.repo_id, api, folder, arguments.revision, arguments.private, arguments.create_pr
    )
    print(f"published {address}")
    if arguments.space:
        settings = space_settings(arguments.repo_id, arguments.revision, agreed)
        address = publish_space(arguments.space, settings, api, arguments.private)
        print(f"published {address}")


def described(package: Package, arguments: PublishArguments) -> str:
    """What would go where."""
    target = "a pull request" if arguments.create_pr else f"main, tagged {arguments.revision}"
    sizes = {path: len(s) if isinstance(s, bytes) else s.stat().st_size for path, s in sorted(package.files.items())}
    lines = [f"{package.kind} to {arguments.repo_id}, {target}; {len(sizes)} files, {package.size / 1e6:.1f} MB:"]
    lines += [f"  {size:>14,}  {path}" for path, size in sizes.items()]
    if arguments.space:
        lines += [f"Space to {arguments.space}:", *(f"  {name}" for name in space_files())]
    return "\n".join(lines)


def publish(
    package: Package, repo_id: str, api: HfApi, folder: Path, revision: str, private=False, create_pr=False
) -> str:
    """
    Bring a package to the Hub, as the module says.

    Args:
        folder: what the package was made of; its logits are the ones to be had from the Hub.
        revision: the tag. With `create_pr` none is set, and nothing but the pull request changes.

    Returns:
        the address.

    Raises:
        PublishError: the Hub refuses or is not there, the published model is another, the tag names something else, or
            somebody else has committed in the meantime.
    """
    if package.base:
        with told(package.base[0]):
            api.auth_check(package.base[0])
    with told(repo_id):
        start = _repository(repo_id, api, private)
        is_there = same_tree(package, repo_id, start, api)
        if create_pr:
            main = f"{api.endpoint}/{repo_id}/tree/main"
            return main if is_there else _pull_request(package, repo_id, api, folder)
        tagged = _sha(api, repo_id, revision)
        if tagged and not same_tree(package, repo_id, tagged, api):
            raise PublishError(
                f"{repo_id} has a tag {revision} with other files, and what a tag names never changes: give "
                "another by --revision"
            )
        commit = start if is_there else _by_way_of_a_branch(package, repo_id, start, api, folder)
        if tagged is None:
            api.create_tag(repo_id, tag=revision, revision=commit)
        _drop_branch(package, repo_id, api)
    return f"{api.endpoint}/{repo_id}/tree/{revision}"


def _repository(repo_id: str, api: HfApi, private: bool) -> str:
    """The commit that `main` is at; the repository is made if it does not exist."""
    try:
        found = api.model_info(repo_id)
    except RepositoryNotFoundError as error:
        if isinstance(error, GatedRepoError):
            raise
        api.create_repo(repo_id, private=private, exist_ok=True)
        found = api.model_info(repo_id)
    _stays_private(repo_id, found, private)
    return found.sha


def _stays_private(repo_id: str, found: ModelInfo | SpaceInfo, private: bool):
    if private and not found.private:
        raise PublishError(
            f"{repo_id} is there already, and everybody may read it: --private makes a new repository private and "
            "hides no old one. Make it private in its settings on the Hub, or choose another name"
        )


def _by_way_of_a_branch(package: Package, repo_id: str, start: str, api: HfApi, folder: Path) -> str:
    api.create_branch(repo_id, branch=_branch(package), exist_ok=True)
    staged = _commit(package, repo_id, api, revision=_branch(package)).oid
    _check(package, repo_id, staged, api, folder)
    # The same files again, of which the Hub has all: one commit, and only if nobody else made one.
    commit = _commit(package, repo_id, api, revision="main", parent_commit=start).oid
    if not same_tree(package, repo_id, commit, api):
        raise PublishError(f"{repo_id} at {commit} is not what was committed; run the same command again")
    return commit


def _branch(package: Package) -> str:
    return f"publish-{package.sha[:12]}"


def _drop_branch(package: Package, repo_id: str, api: HfApi):
    """This run's, or that of an earlier one that failed just before this."""
    if any(ref.name == _branch(package) for ref in api.list_repo_refs(repo_id).branches):
        api.delete_branch(repo_id, branch=_branch(package))


def _pull_request(package: Package, repo_id: str, api: HfApi, folder: Path) -> str:
    refs = api.list_repo_refs(repo_id, include_pull_requests=True)
    for ref in refs.pull_requests or []:
        if same_tree(package, repo_id, ref.target_commit, api):  # of an earlier run
            _check(package, repo_id, ref.target_commit, api, folder)
            return f"{api.endpoint}/{repo_id}/discussions/{ref.name.rpartition('/')[2]}"
    commit = _commit(package, repo_id, api, create_pr=True)
    _check(package, repo_id, commit.oid, api, folder)
    return commit.pr_url


def _commit(package: Package, repo_id: str, api: HfApi, **where):
    added = [
        CommitOperationAdd(path, source if isinstance(source, bytes) else str(source))
        for path, source in sorted(package.files.items())
    ]
    there = (file.path for file in _tree(repo_id, where.get("revision", "main"), api))
    removed = [CommitOperationDelete(path) for path in package.stale(there)]
    return api.create_commit(repo_id, [*added, *removed], commit_message=f"Granulon {package.sha[:12]}", **where)


def same_tree(package: Package, repo_id: str, revision: str, api: HfApi) -> bool:
    """Whether a revision holds the package's files, byte for byte, and nothing of an earlier state beside them."""
    there = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in _tree(repo_id, revision, api)}
    return not package.stale(there) and all(there.get(path) in hashes for path, hashes in package.hashes.items())


def _tree(repo_id: str, revision: str, api: HfApi) -> Iterator:
    return (
        entry for entry in api.list_repo_tree(repo_id, recursive=True, revision=revision) if hasattr(entry, "size")
    )


def _sha(api: HfApi, repo_id: str, revision: str) -> str | None:
    try:
        return api.model_info(repo_id, revision=revision).sha
    except RevisionNotFoundError:
        return None


def _check(package: Package, repo_id: str, commit: str, api: HfApi, folder: Path):
    """The files are whole, and a stranger gets the same logits and the same answer from them."""
    if not same_tree(package, repo_id, commit, api):
        raise PublishError(f"{repo_id} at {commit} is not what was uploaded; run the same command again")
    local_folder = str(folder.resolve())  # the fresh process works elsewhere
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if package.kind == "adapter":
            sources = [(*package.base, local_folder), (*package.base, repo_id, commit)]
        elif package.kind == "trainable":
            sources = [(local_folder,), (put_together(folder, repo_id, commit, work, api),)]
        else:
            sources = [(local_folder,), (repo_id, commit)]
        (local, answer), (published, same_answer) = (cold_load(work, api, *source) for source in sources)
    if not torch.equal(local, published) or answer != same_answer:
        raise PublishError(
            f"{repo_id} at {commit} is another model than {folder}: it answers {same_answer!r} and not {answer!r}; "
            "main is untouched"
        )


def put_together(folder: Path, repo_id: str, commit: str, work: Path, api: HfApi) -> str:
    """The folder that the card's command makes, in a fresh process, of what was published and of the makers' parts."""
    manifest, output = read_manifest(folder), str(work / "again")
    vision, text = ("{source}@{revision}".format(**manifest[part]) for part in ("vision", "text"))
    command = ["-m", "granulon.hub.assemble", "--vision", vision, "--text", text, "--output", output]
    otherwise = f"{repo_id} at {commit} cannot be put together with {vision} and {text}"
    _in_a_fresh_process(otherwise, [*command, "--trained", f"{repo_id}@{commit}"], work, api)
    return output


def cold_load(work: Path, api: HfApi, *source: str) -> tuple[torch.Tensor, str]:
    """Logits and answer that a fresh process gets; `source` is as cold_load.py takes it."""
    output = work / "seen.safetensors"
    script = str(Path(__file__).with_name("cold_load.py"))
    what = " at ".join(source[2:] or source[:2])
    _in_a_fresh_process(f"{what} does not load", [script, str(output), *source], work, api)
    with safe_open(output, "pt") as seen:
        return seen.get_tensor("logits"), seen.metadata()["answer"]


def _in_a_fresh_process(otherwise: str, command: list[str], work: Path, api: HfApi):
    """Run Python with caches of its own, which are empty at first; raises `PublishError` if it does not end well."""
    token = {"HF_TOKEN": api.token} if isinstance(api.token, str) else {}
    environment = {
        **os.environ, **token, "HF_ENDPOINT": api.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(work / "hub"),
        "HF_MODULES_CACHE": str(work / "modules"),
    }  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, *command], env=environment, cwd=work, capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired as error:
        raise PublishError(
            f"{otherwise} in a fresh process within {PATIENCE // 60} minutes; main is untouched, run the same command "
            "again"
        ) from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise PublishError(f"{otherwise} in a fresh process: {last[0]}; main is untouched")


def _check_space(arguments: PublishArguments):
    """Raises `PublishError` where the Space could not load what is published, or is not here."""
    if arguments.create_pr:
        raise PublishError("--space shows what a tag names, and a pull request gets none: leave out one of the two")
    if arguments.kind != KINDS[0]:
        option = "--adapter" if arguments.adapter else "--trainable_only"
        raise PublishError(
            f"--space shows a whole model, and {option} publishes none: publish the merged or assembled model with it"
        )
    space_files()


def _space_warnings(arguments: PublishArguments) -> list[str]:
    if not (arguments.space and arguments.private):
        return []
    return [
        f"the Space {arguments.space} can read {arguments.repo_id}, which is private, with a token only: put one that "
        "may read it into the Space's settings, as the secret HF_TOKEN"
    ]


def space_files() -> list[str]:
    if not (SPACE / "app.py").is_file():
        raise PublishError(f"there is no Space in {SPACE}: publish it from a clone of the repository")
    names = (str(file.relative_to(SPACE)) for file in sorted(SPACE.rglob("*")) if file.is_file())
    return [name for name in names if matches(name, SPACE_FILES)]


def space_settings(model_id: str, revision: str, agreed: Terms) -> dict[str, str]:
    """The Space's variables: the model it shows, and the line that Llama's licence wants to be seen."""
    shown = {NOTICE_SETTING: LLAMA_LINE} if any(LLAMA_LINE in line for line in agreed.credits) else {}
    return {"MODEL_ID": model_id, "MODEL_REVISION": revision, **shown}


def publish_space(space_id: str, settings: dict[str, str], api: HfApi, private: bool = False) -> str:
    """Upload the Space in one commit, with its settings; its address."""
    card = SpaceCard.load(SPACE / "README.md")
    card.data.models = [settings["MODEL_ID"]]
    contents = {name: str(SPACE / name) for name in space_files()} | {"README.md": str(card).encode()}
    with told(space_id, elsewhere="choose a Space of your own with --space"):
        api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        _stays_private(space_id, api.space_info(space_id), private)
        there = {key: variable.value for key, variable in api.get_space_variables(space_id).items()}
        for key, value in settings.items():
            if there.get(key) != value:
                api.add_space_variable(space_id, key, value)
        if NOTICE_SETTING in there and NOTICE_SETTING not in settings:  # of another model that it showed
            api.delete_space_variable(space_id, NOTICE_SETTING)
        added = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(space_id, added, commit_message="The Space", repo_type="space")
    return f"{api.endpoint}/spaces/{space_id}"


@contextmanager
def told(repo_id: str, elsewhere="choose a name of your own, or offer the files by --create_pr"):
    """What the Hub says, in a sentence that tells what to do; `elsewhere` is where one may write."""
    try:
        yield
    except PublishError:
        raise
    except Exception as error:
        if (refusal := _cause(error, lambda cause: isinstance(cause, HfHubHTTPError))) is not None:
            raise PublishError(_refused(repo_id, refusal, elsewhere)) from error
        if (broken := _cause(error, _is_of_the_transport)) is not None:
            raise PublishError(
                f"the connection to the Hub broke ({broken or type(broken).__name__}); run the same command again, "
                "what is uploaded is kept"
            ) from error
        raise


def _refused(repo_id: str, error: HfHubHTTPError, elsewhere: str) -> str:
    status, said = error.response.status_code, str(error.server_message or error).strip().splitlines()[0]
    remedy = {
        401: "it does not know the token, or there is none: log in by `hf auth login`, with one that may write",
        403: f"you may not write there: {elsewhere}",
        404: "it is not there, or the token may not see it",
        409: "another operation is in the way: run the same command again",
        412: "somebody else committed in the meantime: look at that, then run the same command again",
    }.get(status, "run the same command again; what is uploaded is kept")
    if isinstance(error, GatedRepoError):
        remedy = "it is gated: accept its conditions on the Hub with the account of your token"
    return f"the Hub refuses {repo_id} ({status}: {said}); {remedy}"


def _cause(error: BaseException | None, wanted) -> BaseException | None:
    """The error itself or the first among its causes that is wanted; the client wraps those of an upload."""
    while error is not None and not wanted(error):
        error = error.__cause__
    return error


def _is_of_the_transport(error: BaseException) -> bool:
    """The transport's library goes by more than one name."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError) or library in ("httpx", "httpx2", "httpcore", "httpcore2")


def _pairs(entries: list[str]) -> dict[str, str]:
    if wrong := [entry for entry in entries if "=" not in entry]:
        raise PublishError(f"--data_licence takes SOURCE=LICENCE, found {wrong}")
    return dict(entry.rsplit("=", 1) for entry in entries)


if __name__ == "__main__":
    main()
