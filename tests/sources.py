"""Folders that look like the Hub's: encoders and language models saved by transformers, small, random, made here."""

from pathlib import Path

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

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
