"""Folders that look like the Hub's: encoders and language models saved by transformers, small, random, made here."""

import json
from pathlib import Path

import torch
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ConvNextConfig,
    DINOv3ViTConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Siglip2Config,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipVisionConfig,
)

TEMPLATES = Path(trl.__file__).parent / "chat_templates"  # the real ones of the real models

QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + [
    f"<|{name}|>"
    for name in (
        "object_ref_start object_ref_end box_start box_end quad_start quad_end "
        "vision_start vision_end vision_pad image_pad video_pad"
    ).split()
]
LLAMA_TOKENS = (
    ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    + ["<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"]
    + ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    + [f"<|reserved_special_token_{index}|>" for index in range(3, 8)]
)
TEXT = ["How many red circles are left of the large blue square? Describe the whole scene in one sentence."]


def tokenizer_of(family):
    """A trained byte-level BPE tokenizer with the special tokens and the chat template of `qwen2` or `llama`."""
    special = {"qwen2": QWEN_TOKENS, "llama": LLAMA_TOKENS}[family]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    if family == "qwen2":
        names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        template = "qwen2_5.jinja"
    else:
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        template = "llama3_2.jinja"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": special, **names})
    if family == "llama":
        bos = tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
        )
    tokenizer.chat_template = (TEMPLATES / template).read_text()
    return tokenizer


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT = {**SMALL, "intermediate_size": 48, "image_size": 32, "patch_size": 4}
TEXT_TOWER = {**SMALL, "intermediate_size": 48, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 2}
VISION_CONFIGS = {
    "dinov3": DINOv3ViTConfig(**VIT),
    "dinov3_convnext": DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=128),
    "dinov2": Dinov2Config(**SMALL, mlp_ratio=2, image_size=32, patch_size=4),
    "dinov2_registers": Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2, image_size=32, patch_size=4),
    "clip_vision": CLIPVisionConfig(**VIT),
    "siglip_vision": SiglipVisionConfig(**VIT),
    "clip": CLIPConfig(vision_config=VIT, text_config=TEXT_TOWER),
    "siglip": SiglipConfig(vision_config=VIT, text_config=TEXT_TOWER),
    "siglip2": Siglip2Config(
        vision_config=Siglip2VisionConfig(**SMALL, intermediate_size=48, patch_size=4, num_patches=64).to_dict(),
        text_config=TEXT_TOWER,
    ),
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
OPENAI = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
SQUARE = {"height": 32, "width": 32}
PREPROCESSORS = {  # as in the repositories of the real encoders, but for the sizes
    "dinov3": {
        **IMAGENET,
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "do_center_crop": None,
        "crop_size": None,
        "do_convert_rgb": None,
        "size": SQUARE,
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
    },
    "dinov2": {
        **IMAGENET,
        "image_processor_type": "BitImageProcessor",
        "do_center_crop": True,
        "crop_size": SQUARE,
        "size": {"shortest_edge": 36},
        "resample": 3,
    },
    "clip": {
        **OPENAI,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_center_crop": True,
        "crop_size": 32,
        "size": 32,
        "resample": 3,
    },
    "siglip": {**HALF, "image_processor_type": "SiglipImageProcessor", "size": SQUARE, "resample": 3},
    "siglip2": {**HALF, "image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 64, "resample": 2},
}
PREPROCESSORS["dinov3_convnext"] = {**PREPROCESSORS["dinov3"], "size": {"height": 128, "width": 128}}
PREPROCESSORS["dinov2_registers"] = PREPROCESSORS["dinov2"]
PREPROCESSORS["clip_vision"], PREPROCESSORS["siglip_vision"] = PREPROCESSORS["clip"], PREPROCESSORS["siglip"]

DECODER = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 1, "max_position_embeddings": 4096}
CARD = """---
license: {license}
---
# {name}
"""


def vision_source(folder, name, seed=1):
    """A vision repository: weights, configuration, the preprocessor as the Hub has it, model card and licence."""
    torch.manual_seed(seed)
    AutoModel.from_config(VISION_CONFIGS[name]).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSORS[name]))
    licence = "license: other\nlicense_name: dinov3-license\nlicense_link: https://example.org/dinov3"
    (folder / "README.md").write_text(CARD.format(license="x", name=name).replace("license: x", licence))
    (folder / "LICENSE.md").write_text("the DINOv3 licence\n")
    return folder


def text_source(folder, family, seed=2, tie=True, tokenizer=None, **config):
    """A language model's repository: weights, tokenizer with real special tokens and template, generation config."""
    torch.manual_seed(seed)
    tokenizer = tokenizer or tokenizer_of(family)
    config = {"vocab_size": len(tokenizer), "tie_word_embeddings": tie, **DECODER, **config}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config({"qwen2": Qwen2Config, "llama": LlamaConfig}[family](**config, **ids))
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8, eos_token_id=[tokenizer.eos_token_id])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD.format(license="apache-2.0", name=family))
    return folder
