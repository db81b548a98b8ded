"""The files of a checkpoint folder that are published: an allow list, checks, and the model card."""

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files as package_files
from pathlib import Path, PurePosixPath

import yaml
from huggingface_hub import (
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
    parse_eval_result_entries,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .assemble import TRAINABLE, TRAINABLE_WEIGHTS
from .licences import LICENCE, Terms, licence_text, public_name, training_data
from .manifest import LICENCE_FILES, MANIFEST, read_manifest, weights_sha256
from .parts import KNOWN_PARTS

KINDS = MODEL, ADAPTER, TRAINABLE_ONLY = "model", "adapter", "trainable"
CARD, NOTICE, INDEX = "README.md", "NOTICE", "model.safetensors.index.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROCESSOR = ["processor_config.json", "tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model"]
VOCABULARIES = ["tokenizer.json", "special_tokens_map.json", "vocab.json"]  # a token such as "/" is not a path
METADATA_FILES = [MANIFEST, "controller_report.json", "controller_confusion.png", "licences/*/*", *LICENCE_FILES]
ALLOWED = {
    MODEL: ["model*.safetensors", INDEX, "config.json", "generation_config.json", "*.py", "*.jinja"],
    ADAPTER: [ADAPTER_WEIGHTS, ADAPTER_CONFIG, "*.py", "*.jinja"],
    TRAINABLE_ONLY: ["config.json", "*.py", "*.jinja"],
}
RELEASE = "granulon_release.json"  # the hashes of what was published with it: what a later release may overwrite
RESULTS = ".eval_results/*.yaml"  # where the Hub reads evaluation results
# Everything that this publisher may have put into a repository, and what else a loader would read.
PUBLISHED = [
    TRAINABLE,
    RELEASE,
    *PROCESSOR,
    *METADATA_FILES,
    RESULTS,
    *(entry for kind in KINDS for entry in ALLOWED[kind]),
]
LOADED_SUFFIXES = (".safetensors", ".safetensors.index.json", ".py", ".json", ".jinja", ".bin", ".model")


@dataclass
class Package:
    """Files to publish."""

    kind: str  # one of `KINDS`
    files: dict[str, Path | bytes]  # path in the repository to a file, or to its content
    base: tuple[str, str] | None = None  # of an adapter: the model it belongs to, and that model's revision

    def __post_init__(self):
        # SHA-256 and git hash of each file: the Hub reports the first for large files, the second for small ones.
        self.hashes = {path: _hashes(content) for path, content in self.files.items()}
        self.files[RELEASE] = _to_json({"files": self.hashes})
        self.hashes[RELEASE] = _hashes(self.files[RELEASE])

    @cached_property
    def sha(self) -> str:
        """A hash of all files and their paths."""
        return hashlib.sha256(json.dumps(sorted(self.hashes.items())).encode()).hexdigest()

    @property
    def branch(self) -> str:
        """The branch on which the package is verified before `main` changes."""
        return f"publish-{self.sha[:12]}"

    def stale(self, paths: Iterable[str]) -> list[str]:
        """Those paths of a repository that belong to an earlier version and must be deleted."""
        old = set(paths) - set(self.files)
        return sorted(path for path in old if path.endswith(LOADED_SUFFIXES) or matches(path, PUBLISHED))


def matches(path: str, patterns: list[str]) -> bool:
    """Whether a path matches one of the patterns, whose stars do not cross folders."""
    return any(PurePosixPath("/", path).match(f"/{pattern}") for pattern in patterns)


def size_of(content: Path | bytes) -> int:
    """The size of a file of a package in bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _open(content: Path | bytes):
    return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")


def _hashes(content: Path | bytes) -> tuple[str, str]:
    with _open(content) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        return sha256, hashlib.file_digest(file, lambda: hashlib.sha1(b"blob %d\0" % size_of(content))).hexdigest()


def make_package(
    folder: str | Path, kind: str, terms: Terms, repo_id: str, revision: str, base=None, results=None
) -> Package:
    """
    Collect and check the files of a checkpoint that go to the Hub, with model card, licence and notices.

    Args:
        kind: one of `KINDS`.
        repo_id, revision: repository and tag, for the card.
        base: of an adapter, OWNER/NAME@REVISION of the model it was trained on; by default from its configuration.
        results: folder that granulon-evaluate wrote, for the card.

    Raises:
        ValueError: a folder that does not fit `kind`, lacks files, or has other code than this package.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    names = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
    allowed = [*ALLOWED[kind], *PROCESSOR, *METADATA_FILES, RESULTS]
    kept = {name: folder / name for name in names if matches(name, allowed)}
    _check_files(folder, kind, kept)
    jsons = [name for name in kept if name.endswith(".json") and name not in VOCABULARIES]
    files = {**kept, **{name: _without_local_paths(kept[name]) for name in jsons}}
    files |= evaluation_files(Path(results), folder) if results else {}
    if kind == TRAINABLE_ONLY:
        files[TRAINABLE] = _trainable_weights(folder, manifest)
    if kind == ADAPTER:
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        base = _adapter_base(config, folder / ADAPTER_CONFIG, base)
        files[ADAPTER_CONFIG] = _to_json(_public(config | dict(zip(("base_model_name_or_path", "revision"), base))))
    if terms.notices:
        own = kept[NOTICE].read_text() if NOTICE in kept else ""
        lines = [*own.splitlines(), *(line for line in terms.notices if line not in own), ""]
        files[NOTICE] = "\n".join(lines).encode()
    files[LICENCE] = licence_text(terms, [name for name in kept if name.startswith("licences/")]).encode()
    names = {"name": repo_id.rpartition("/")[2], "repo_id": repo_id, "revision": revision}
    files[CARD] = _card(folder, manifest, kind, terms, base, _read_results(files), **names).encode()
    return Package(kind, files, base)


def _card(folder: Path, manifest: dict, kind: str, terms: Terms, base, results: list[EvalResultEntry], **names) -> str:
    """The model card, from the manifest, the requirements of the licences and the evaluation results."""
    parts = [manifest[name] | {"name": name, "licence": terms.licences[name]} for name in ("vision", "text")]
    pinned = [f"--{part['name']} {part['source']}@{part['revision']} " for part in parts if part["revision"]]
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    data = ModelCardData(
        **terms.metadata,
        pipeline_tag="image-text-to-text",
        library_name="peft" if kind == ADAPTER else "transformers",
        base_model=[base[0]] if kind == ADAPTER else [part["source"] for part in parts if part["revision"]] or None,
        base_model_relation="adapter" if kind == ADAPTER else "finetune",
        tags=["granulon", "custom_code"],
    )
    values = {"kind": kind, "base": base, "pinned": "".join(pinned), "parts": parts, "results": results}
    values |= {"credits": terms.credits, "warnings": terms.warnings, "granularities": config.get("granularities")}
    values["training"] = [_training_row(run) for run in manifest.get("training", [])]
    template = str(Path(__file__).with_name("model_card.md"))
    return str(ModelCard.from_template(data, template_path=template, **names, **values))


def _training_row(run: dict) -> dict:
    versions = run.get("versions", {})
    code = [versions.get("granulon"), (versions.get("granulon_commit") or "")[:12]]
    return run | {"data": ", ".join(map(public_name, training_data(run))), "code": " ".join(filter(None, code))}


def evaluation_files(output: Path, folder: Path) -> dict[str, bytes]:
    """
    Evaluation results in the form that the Hub reads, `.eval_results/TASK.yaml`: for each task the newest run.

    Only runs of the checkpoint `folder` without changes of level, view or configuration, on all samples of a data set
    of the Hub; `output` is the folder that granulon-evaluate wrote. Raises `ValueError` if there is none.
    """
    weights = weights_sha256(folder)
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in output.glob("runs/*/result.json")]
    selected = sorted((run for run in runs if _is_publishable(run, weights)), key=lambda run: run["finished_at"])
    if not selected:
        raise ValueError(
            f"none of the {len(runs)} runs in {output} has the weights of {folder} and all samples of a data set: run "
            f"granulon-evaluate --model {folder} without --limit, --granularity, --view and --overrides"
        )
    return {f".eval_results/{run['task']['name']}.yaml": _results_yaml(run) for run in selected}


def _is_publishable(run: dict, weights: str) -> bool:
    entry, settings = run["entry"], run["settings"]
    return (
        run["model"].get("sha256") == weights
        and not run["not_computed"]
        and (entry["granularity"], entry["view"], entry["overrides"]) == (None, "full", {})
        and not settings["sample_rows"]
        and settings["limit"] is None
        and (run["task"]["config"].get("dataset_path") or "").count("/") == 1
    )


def _results_yaml(run: dict) -> bytes:
    entries = []
    for name, metric in run["metrics"].items():
        if metric["value"] is None:
            continue
        notes = f"n = {metric['n']}"
        if metric["low"] is not None and metric["high"] is not None:
            notes = f"95% interval {metric['low']:.4f} to {metric['high']:.4f}, {notes}"
        source = {"dataset_id": run["task"]["config"]["dataset_path"], "task_id": f"{run['task']['name']}.{name}"}
        value = round(metric["value"], 4)
        entries.append(EvalResultEntry(**source, value=value, date=run["finished_at"], notes=notes))
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False).encode()


def _read_results(files: dict[str, Path | bytes]) -> list[EvalResultEntry]:
    entries = []
    for name in sorted(name for name in files if matches(name, [RESULTS])):
        try:
            with _open(files[name]) as file:
                entries += parse_eval_result_entries(yaml.safe_load(file))
        except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{name} does not hold evaluation results as the Hub reads them: {error!r}") from error
    return entries


def _check_files(folder: Path, kind: str, kept: dict[str, Path]):
    """All weights and the processor are there, and the code is byte for byte the code of this package."""
    only_trained = kind == TRAINABLE_ONLY and (folder / TRAINABLE).is_file()
    check_no_links(folder, kept)
    weights = {ADAPTER_WEIGHTS if kind == ADAPTER else TRAINABLE if only_trained else "model.safetensors"}
    if kind != ADAPTER and "config.json" not in kept:
        raise ValueError(f"{folder} has neither config.json nor {ADAPTER_CONFIG}: no model and no adapter")
    if kind != ADAPTER and (folder / INDEX).is_file():
        weights = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    if absent := sorted(name for name in weights if not (folder / name).is_file()):
        raise ValueError(f"{folder} lacks {', '.join(absent[:3])} ({len(absent)} in all); save the checkpoint again")
    if kind == MODEL:
        shards = {name for name in kept if matches(name, ["model*.safetensors"])}
        if other := sorted(shards ^ weights):
            names = f"{', '.join(other[:3])} ({len(other)} in all)"
            where = f"{INDEX} and the files" if (folder / INDEX).is_file() else "model.safetensors and the files"
            raise ValueError(
                f"{folder}: {where} beside it do not agree on {names}; remove what is left of older saves"
            )
    for name in weights:
        try:
            with safe_open(folder / name, "pt"):  # reads the header, which holds the size of the file
                pass
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged or cut short ({error}); save it again") from error
    if "processor_config.json" not in kept:
        raise ValueError(f"{folder} has no processor; write it with processor.save_pretrained({str(folder)!r})")

    modules = [file for file in package_files("modeling_granulon").iterdir() if file.name.endswith(".py")]
    expected = {file.name: file.read_bytes() for file in modules if file.name != "__init__.py"}
    found = {name: path.read_bytes() for name, path in kept.items() if name.endswith(".py")}
    if kind == ADAPTER or only_trained:  # only the processor's modules, or none
        expected = {name: expected.get(name) for name in found}
    if other := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        names, remedy = ", ".join(other[:3]), "load the model and save it again with the installed version"
        raise ValueError(f"{folder} has other code than this package ({names}): {remedy}")


def check_no_links(folder: Path, names: Iterable[str]):
    """Raise `ValueError` for files that are links, which could lead anywhere on this machine."""
    paths = {name: [folder / name, *(folder / parent for parent in Path(name).parents[:-1])] for name in names}
    if linked := sorted(name for name, own in paths.items() if any(path.is_symlink() for path in own)):
        raise ValueError(f"{folder} has links ({', '.join(linked[:3])}); copy the files themselves: cp -rL")


def _trainable_weights(folder: Path, manifest: dict) -> bytes:
    """Projector, gains and controller of a model whose encoder and language model were not trained.

    A folder that holds trained parts alone has them as they are, adapters included.
    """
    trained_alone = (folder / TRAINABLE).is_file()
    stages = [run["stage"] for run in manifest.get("training", [])]
    if changed := [stage for stage in stages if stage not in ("align", "words", "controller") and not trained_alone]:
        raise ValueError(
            f"the language model was trained too (stages {changed}): publish the whole model or an adapter"
        )
    if local := [part for part in ("vision", "text") if not _can_be_had(manifest[part])]:
        reason = f"the {' and '.join(local)} part came from a local folder, which others do not have"
        raise ValueError(f"{reason}: publish the whole model")
    if trained_alone:
        return (folder / TRAINABLE).read_bytes()
    weights = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as stored:
            names = [name for name in stored.keys() if name.startswith(TRAINABLE_WEIGHTS)]
            weights |= {name: stored.get_tensor(name) for name in names}
    return save(weights, {"format": "pt"})


def _can_be_had(part: dict) -> bool:
    """Whether a part is a revision of the Hub or a known part."""
    return bool(part.get("revision")) or part["source"] in [known.repo_id for known in KNOWN_PARTS.values()]


def _adapter_base(config: dict, file: Path, given: str | None) -> tuple[str, str]:
    """Repository and revision that an adapter belongs to, as given, else from its configuration."""
    configured = "@".join(filter(None, (config.get("base_model_name_or_path"), config.get("revision"))))
    name, _, revision = (given or configured).partition("@")
    if not name:
        raise ValueError(f"{file} names no base model: name it with --base_model OWNER/NAME@REVISION")
    if Path(name).exists() or name.count("/") != 1:
        remedy = "publish the base, and name it with --base_model OWNER/NAME@REVISION"
        raise ValueError(f"the adapter's base is {name}, a folder of this machine: {remedy}")
    if not revision:
        remedy = f"name the one that the adapter was trained on with --base_model {name}@REVISION"
        raise ValueError(f"unknown revision of {name}: {remedy}")
    return name, revision


def _without_local_paths(file: Path) -> Path | bytes:
    """A JSON file: as it is, or its content without the folders of this machine if it names some."""
    content = json.loads(file.read_text(encoding="utf-8"))
    public = _public(content)
    return file if public == content else _to_json(public)


def _public(value):
    if isinstance(value, dict):
        return {key: _public(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_public(entry) for entry in value]
    return public_name(value) if isinstance(value, str) else value


def _to_json(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
