"""What of a checkpoint folder is published: nothing but what is named here, whole, and with its card."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files as package_files
from pathlib import Path, PurePosixPath

import yaml
from huggingface_hub import EvalResultEntry, ModelCard, ModelCardData, parse_eval_result_entries
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from .assemble import LICENCE_FILES, MANIFEST, TRAINABLE, TRAINED
from .eval_results import eval_results
from .licences import LICENCE, Terms, data_of, licence_text, public_name, read_manifest

KINDS = ("model", "adapter", "trainable")
CARD, NOTICE, INDEX = "README.md", "NOTICE", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROCESSOR = ["processor_config.json", "tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model"]
TOKENS = ["tokenizer.json", "special_tokens_map.json", "vocab.json"]  # of which "/" may be one, and is no path
PAPERS = [MANIFEST, "controller_report.json", "controller_confusion.png", "licences/*/*", *LICENCE_FILES]
ALLOWED = {
    "model": ["model*.safetensors", INDEX, "config.json", "generation_config.json", "*.py", "*.jinja"],
    "adapter": [ADAPTER, ADAPTER_CONFIG, "*.py", "*.jinja"],
    "trainable": ["config.json", "*.py", "*.jinja"],
}
RESULTS = ".eval_results/*.yaml"
# All that this publisher may have put into a repository, and what else a loader would take.
OURS = [TRAINABLE, *PROCESSOR, *PAPERS, RESULTS, *(pattern for patterns in ALLOWED.values() for pattern in patterns)]
LOADED = (".safetensors", ".safetensors.index.json", ".py", ".json", ".jinja", ".bin", ".model")


@dataclass
class Package:
    """
    Files to publish.

    Attributes:
        kind: one of `KINDS`.
        files: path in the repository to a file, or to its content.
        base: of an adapter, the model it belongs to, and the revision of it.
    """

    kind: str
    files: dict[str, Path | bytes] = field(repr=False)
    base: tuple[str, str] | None = None

    @cached_property
    def hashes(self) -> dict[str, tuple[str, str]]:
        """Of each file sha256 and git's own hash: the Hub tells the one of large files and the other of small ones."""
        return {path: _hashes(source) for path, source in self.files.items()}

    @cached_property
    def sha(self) -> str:
        """Of everything: the same files have the same."""
        return hashlib.sha256(json.dumps(sorted(self.hashes.items())).encode()).hexdigest()

    def stale(self, there: Iterable[str]) -> list[str]:
        """Of a repository's paths those that an earlier state left, and that would speak for this one."""
        return sorted(path for path in set(there) - set(self.files) if path.endswith(LOADED) or matches(path, OURS))

    @property
    def size(self) -> int:
        return sum(
            len(source) if isinstance(source, bytes) else source.stat().st_size for source in self.files.values()
        )


def make_package(
    folder: str | Path, kind: str, terms: Terms, repo_id: str, revision: str, base=None, results=None
) -> Package:
    """
    The files of a checkpoint that go to the Hub, the card and the notices among them.

    Args:
        base: of an adapter, what it was trained on, OWNER/NAME@REVISION, where it does not say so itself.
        results: folder of what granulon-evaluate found, to be told on the card.

    Raises:
        ValueError: a folder that is not what `kind` says, lacks files, or holds other code than this package.
    """
    folder = Path(folder)
    names = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
    allowed = [*ALLOWED[kind], *PROCESSOR, *PAPERS, RESULTS]
    kept = {name: folder / name for name in names if matches(name, allowed)}
    {"model": _check_model, "adapter": _check_adapter, "trainable": _check_model}[kind](folder, kept)
    read_manifest(folder)  # which tells what is wrong with it
    hidden = {name: _public(path) for name, path in kept.items() if name.endswith(".json") and name not in TOKENS}
    files = {**kept, **hidden, **(eval_results(Path(results), folder) if results else {})}
    if kind == "trainable":
        files[TRAINABLE] = _trained_weights(folder)
    if kind == "adapter":
        base = _base(folder, base)
        files[ADAPTER_CONFIG] = _with_base(folder, *base)
    if terms.notices:
        own = kept[NOTICE].read_text() if NOTICE in kept else ""
        files[NOTICE] = "\n".join(
            [*own.splitlines(), *(line for line in terms.notices if line not in own), ""]
        ).encode()
    files[LICENCE] = licence_text(terms, [name for name in kept if name.startswith("licences/")]).encode()
    files[CARD] = card(folder, kind, terms, repo_id, revision, base, _results(files)).encode()
    return Package(kind, files, base)


def card(
    folder: Path,
    kind: str,
    terms: Terms,
    repo_id: str,
    revision: str,
    base: tuple[str, str] | None,
    results: list[EvalResultEntry],
) -> str:
    """The model card, from the manifest and what the licences ask for."""
    manifest = read_manifest(folder)
    parts = [manifest["vision"] | {"name": "vision"}, manifest["text"] | {"name": "text"}]
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    data = ModelCardData(
        **terms.metadata,
        pipeline_tag="image-text-to-text",
        library_name="peft" if kind == "adapter" else "transformers",
        base_model=[base[0]] if kind == "adapter" else [part["source"] for part in parts if part["revision"]] or None,
        base_model_relation="adapter" if kind == "adapter" else "finetune",
        tags=["granulon", "custom_code"],
    )
    lines = {line.split(" part: ")[0]: line.rpartition(" ")[2] for line in terms.credits if " part: " in line}
    return str(
        ModelCard.from_template(
            data,
            template_path=str(Path(__file__).with_name("model_card.md")),
            name=repo_id.rpartition("/")[2],
            repo_id=repo_id,
            revision=revision,
            kind=kind,
            base=base,
            vision="{source}@{revision}".format(**parts[0]),
            text="{source}@{revision}".format(**parts[1]),
            parts=[part | {"licence": lines[part["name"]]} for part in parts],
            granularities=config.get("granularities"),
            training=[_told(run) for run in manifest.get("training", [])],
            results=results,
            credits=terms.credits,
            warnings=terms.warnings,
        )
    )


def _told(run: dict) -> dict:
    made = run.get("versions", {})
    return run | {
        "data": ", ".join(map(public_name, data_of(run))),
        "code": " ".join(filter(None, (made.get("granulon"), (made.get("granulon_commit") or "")[:12]))),
    }


def _results(files: dict[str, Path | bytes]) -> list[EvalResultEntry]:
    entries = []
    for name in sorted(name for name in files if matches(name, [RESULTS])):
        content = files[name] if isinstance(files[name], bytes) else files[name].read_bytes()
        try:
            entries += parse_eval_result_entries(yaml.safe_load(content))
        except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{name} does not hold evaluation results as the Hub reads them: {error!r}") from error
    return entries


def _check_model(folder: Path, kept: dict[str, Path]):
    """All weights are there, and the code is this package's, byte for byte."""
    if "config.json" not in kept:
        raise ValueError(f"{folder} has no config.json: it is no checkpoint; for adapters use --adapter")
    shards = {"model.safetensors"}
    if (folder / INDEX).is_file():
        shards = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    if absent := sorted(shard for shard in shards if not (folder / shard).is_file()):
        raise ValueError(f"{folder} lacks {', '.join(absent[:3])} ({len(absent)} in all); save the model again")
    for shard in shards:
        _check_weights(folder / shard)
    _check_code(folder, kept)
    _check_processor(folder, kept)


def _check_adapter(folder: Path, kept: dict[str, Path]):
    if absent := sorted({ADAPTER, ADAPTER_CONFIG} - set(kept)):
        raise ValueError(f"{folder} is no adapter: it has no {', '.join(absent)}")
    _check_weights(folder / ADAPTER)
    _check_code(folder, kept, whole=False)  # the model's is the base's; here is the processor's
    _check_processor(folder, kept)


def _check_weights(file: Path):
    try:
        with safe_open(file, "pt"):  # reads the header, which tells whether the file is whole
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error}); save the model again") from error


def _check_processor(folder: Path, kept: dict[str, Path]):
    if "processor_config.json" not in kept:
        raise ValueError(f"{folder} has no processor; write it with processor.save_pretrained({str(folder)!r})")


def _check_code(folder: Path, kept: dict[str, Path], whole: bool = True):
    package = {
        file.name: file.read_bytes() for file in package_files("modeling_granulon").iterdir() if file.suffix == ".py"
    }
    package.pop("__init__.py")
    found = {name: path.read_bytes() for name, path in kept.items() if name.endswith(".py")}
    names = package.keys() | found.keys() if whole else found.keys()
    other = sorted(name for name in names if package.get(name) != found.get(name))
    if other:
        raise ValueError(
            f"{folder} has other code than this package ({', '.join(other[:3])}): load the model and save it again "
            "with the installed version, so that what is published is what was tested"
        )


def _trained_weights(folder: Path) -> bytes:
    """Projector, gains and controller; for a model whose language model is its makers' still."""
    manifest = read_manifest(folder)
    if changed := [
        run["stage"] for run in manifest.get("training", []) if run["stage"] not in ("align", "controller")
    ]:
        raise ValueError(
            f"the language model was trained too (stages {changed}): without its weights the rest is of no use; "
            "publish the whole model or an adapter"
        )
    if local := [part for part in ("vision", "text") if not manifest[part].get("revision")]:
        raise ValueError(f"the {' and '.join(local)} part came from a local folder: nobody else could put it together")
    weights = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as stored:
            if any(name.startswith(TRAINED) for name in stored.keys()):
                weights |= {name: value for name, value in load_file(file).items() if name.startswith(TRAINED)}
    return save({name: value.contiguous() for name, value in weights.items()}, {"format": "pt"})


def _base(folder: Path, stated: str | None) -> tuple[str, str]:
    """The repository and the revision that an adapter belongs to, as stated, or else as it says itself."""
    own = json.loads((folder / ADAPTER_CONFIG).read_text())
    told = stated or "@".join(filter(None, (own.get("base_model_name_or_path"), own.get("revision"))))
    name, _, revision = told.partition("@")
    if not name:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} names no base: say what the adapter was trained on, with "
            "--base_model OWNER/NAME@REVISION"
        )
    if Path(name).exists() or name.count("/") != 1:
        raise ValueError(
            f"the adapter's base is {name}, a folder of this machine: publish the base, and name it with "
            "--base_model OWNER/NAME@REVISION"
        )
    if not revision:
        raise ValueError(
            f"nobody knows which revision of {name} the adapter was trained on, and on another it is another model: "
            f"say it with --base_model {name}@REVISION"
        )
    return name, revision


def _with_base(folder: Path, name: str, revision: str) -> bytes:
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    named = config | {"base_model_name_or_path": name, "revision": revision}
    return _written(_without_local_paths(named))


def _public(file: Path) -> Path | bytes:
    """A JSON file as the world may see it: itself, unless it names folders of this machine."""
    content = json.loads(file.read_text(encoding="utf-8"))
    public = _without_local_paths(content)
    return file if public == content else _written(public)


def _without_local_paths(value):
    if isinstance(value, dict):
        return {key: _without_local_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_local_paths(entry) for entry in value]
    return public_name(value) if isinstance(value, str) else value


def _written(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def matches(path: str, patterns: list[str]) -> bool:
    """Whether a path is meant by one of the patterns, whose stars do not reach into folders."""
    return any(PurePosixPath("/", path).match(f"/{pattern}") for pattern in patterns)


def _hashes(source: Path | bytes) -> tuple[str, str]:
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    if isinstance(source, bytes):
        sha256.update(source)
        git.update(source)
    else:
        with source.open("rb") as file:
            while block := file.read(1 << 22):
                sha256.update(block)
                git.update(block)
    return sha256.hexdigest(), git.hexdigest()
