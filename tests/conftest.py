"""Small random models, a byte-level tokenizer with real chat tokens, and images, made here and in no time."""

import signal

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ConvNextConfig,
    DINOv3ViTConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SmolLM3Config,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_granulon import GranulonConfig, GranulonForConditionalGeneration, GranulonProcessor

CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|image_pad|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LEVELS = [
    {"name": "coarse", "stride": 2, "clusters": 3, "keep": 2, "view": "semantic"},
    {"name": "fine", "stride": 1, "clusters": 6, "keep": 5, "view": "full"},
]
VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
TOWERS = {
    "dinov3": DINOv3ViTConfig(**VIT),
    "dinov3_convnext": DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=96),
    "dinov2": Dinov2Config(**{key: value for key, value in VIT.items() if key != "intermediate_size"}, mlp_ratio=2),
    "dinov2_registers": Dinov2WithRegistersConfig(
        **{key: value for key, value in VIT.items() if key != "intermediate_size"}, mlp_ratio=2
    ),
    "clip": CLIPVisionConfig(**VIT, projection_dim=16),
    "siglip": SiglipVisionConfig(**VIT),
    "siglip2": Siglip2VisionConfig(**{k: v for k, v in VIT.items() if k != "image_size"}, num_patches=36),
}
DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "pad_token_id": 256,
    "bos_token_id": None,
    "eos_token_id": 258,
}
DECODERS = {
    "llama": LlamaConfig(**DECODER),
    "mistral": MistralConfig(**DECODER, sliding_window=None),
    "olmo2": Olmo2Config(**DECODER),
    "phi3": Phi3Config(**DECODER),
    "qwen2": Qwen2Config(**DECODER),
    "qwen3": Qwen3Config(**DECODER, head_dim=8),
    "smollm3": SmolLM3Config(**DECODER, no_rope_layers=[0, 1], tie_word_embeddings=False),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and the chat tokens: any text can be written, and no token can be forged by chance."""
    alphabet = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|image_pad|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_processor(image_size=24, patch_size=4, num_semantic_tokens=5) -> GranulonProcessor:
    size = {"height": image_size, "width": image_size} if isinstance(image_size, int) else image_size
    image_processor = ViTImageProcessorPil(size=size, do_convert_rgb=True)
    return GranulonProcessor(
        image_processor,
        byte_tokenizer(),
        patch_size=patch_size,
        num_semantic_tokens=num_semantic_tokens,
        image_token="<|image_pad|>",
    )


def make_config(tower="dinov3", decoder="qwen2", **overrides) -> GranulonConfig:
    text = DECODERS[decoder]
    image_token_id = byte_tokenizer().convert_tokens_to_ids("<|image_pad|>")
    values = {"granularities": LEVELS, "controller_hidden_size": 16, "image_token_id": image_token_id, **overrides}
    return GranulonConfig(vision_config=TOWERS[tower].to_dict(), text_config=text.to_dict(), **values)


def make_model(tower="dinov3", decoder="qwen2", seed=0, **overrides) -> GranulonForConditionalGeneration:
    torch.manual_seed(seed)
    model = GranulonForConditionalGeneration(make_config(tower, decoder, **overrides)).eval()
    for parameter in model.model.language_model.parameters():  # large enough that every token matters to the logits
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    if model.model.granularity_controller is not None:
        for parameter in model.model.granularity_controller.parameters():
            torch.nn.init.normal_(parameter, std=1.0)
    projector = model.model.multi_modal_projector
    if projector.has_levels:  # nothing that starts without effect may be tested that way
        for parameter in (projector.gain_offsets, projector.level_embedding, projector.cluster_embedding):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_image(seed=0, size=(40, 30)) -> Image.Image:
    """Blobs of colour on noise, so that clusters are there to be found."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 60, (size[1], size[0], 3))
    for _ in range(4):
        x, y = random.integers(0, size[0] - 8), random.integers(0, size[1] - 8)
        pixels[y : y + 8, x : x + 8] += random.integers(0, 190, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def ask(question: str, images: int = 1) -> list[dict]:
    parts = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def make_inputs(processor, questions, images, **kwargs) -> dict:
    """Rendered and processed prompts; `images` is a list of lists, one per question."""
    texts = [
        processor.apply_chat_template(ask(question, len(row)), add_generation_prompt=True)
        for question, row in zip(questions, images, strict=True)
    ]
    has_images = any(images)
    return processor(text=texts, images=images if has_images else None, padding=True, return_tensors="pt", **kwargs)


def count_calls(model):
    """How often tower, controller, aggregation and projector run from now on."""
    parts = {"vision_tower": 0, "granularity_controller": 0, "aggregation": 0}
    for name in parts:

        def count(module, args, output, name=name):
            parts[name] += 1

        getattr(model.model, name).register_forward_hook(count)
    return parts


@pytest.fixture
def processor():
    return make_processor()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def stamps(tmp_path, monkeypatch):
    """In place of the cut-out photographs: a square in a colour of its own for every stamp and letter."""
    from granulon.train.data import cutouts  # not installed where the plug-in for vLLM is tested

    random = np.random.default_rng(0)
    known = [f"{cutout.stamp}.png" for held_out in (False, True) for cutout in cutouts.cutouts(held_out)]
    for name in known + list(cutouts.SIGNS.values()):
        path = tmp_path / "stamps" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (60, 60), (*random.integers(0, 255, 3).tolist(), 255)).save(path)
    monkeypatch.setattr(cutouts, "STAMPS", tmp_path / "stamps")
    cutouts.stamp.cache_clear()
    yield
    cutouts.stamp.cache_clear()


@pytest.fixture
def interruptible():
    """SIGINT interrupts, as in a terminal; a shell lets what it starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
