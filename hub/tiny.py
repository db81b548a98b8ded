"""A complete Granulon of a few MB with random weights: for tests and for looking around, offline and in seconds."""

import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DINOv3ViTConfig, DINOv3ViTModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from .assemble import assemble

CHAT_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat_tokens=CHAT_TOKENS):
    """One token per byte, and the chat tokens: any text can be written, none has to be learned."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE)
    tokenizer.add_special_tokens(
        {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "additional_special_tokens": list(chat_tokens)}
    )
    return tokenizer


def assemble_tiny(output, seed=0):
    """
    Write a small random encoder and language model, and assemble them as real ones are.

    Args:
        output: folder to write; must not exist yet.
        seed (`int`): of the weights; the global random state is left alone.

    Returns:
        `Path`: the folder.
    """
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(seed)
        vision, text = Path(folder, "tiny-dinov3"), Path(folder, "tiny-qwen2")
        DINOv3ViTModel(
            DINOv3ViTConfig(
                image_size=64, patch_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_register_tokens=4,
            )
        ).save_pretrained(vision)  # fmt: skip
        ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(vision)
        tokenizer = byte_tokenizer()
        Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
                bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        ).save_pretrained(text)  # fmt: skip
        tokenizer.save_pretrained(text)
        return assemble(vision, text, output)
