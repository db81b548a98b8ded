"""transformers' common tests on GranulonConfig, GranulonModel, GranulonForConditionalGeneration and GranulonProcessor.

Collected by run.py, not by `make test`: the tests are fetched from PyPI on first use.
"""

import unittest
from unittest.mock import patch

import torch
import upstream
from transformers import DINOv3ViTConfig, Qwen2Config
from transformers.models.auto import modeling_auto
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from granulon.hub.assemble import CHAT_TOKENS, byte_tokenizer
from modeling_granulon import GranulonConfig, GranulonForConditionalGeneration, GranulonModel, GranulonProcessor

common = upstream.load("test_modeling_common")
processing = upstream.load("test_processing_common")
configuration = upstream.load("test_configuration_common")

# Every test that is switched off here, with the reason why what it expects cannot hold for Granulon.
SKIPS = {
    "test_generation_tester_mixin_inheritance": "transformers' sdist has no tests/generation; tests/ has our own",
}

# The tests ask these tables what kind of model a class is: whether it takes labels, whether it has a head.
modeling_auto.MODEL_MAPPING_NAMES["granulon"] = GranulonModel.__name__
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["granulon"] = GranulonForConditionalGeneration.__name__

# Random text holds neither the placeholder (0) nor padding (1): a lone placeholder is refused.
random_ids = common.ids_tensor
common.ids_tensor = lambda shape, vocab_size, *rest, **named: random_ids(shape, vocab_size - 2, *rest, **named) + 2

IMAGE_TOKEN_ID, PAD_TOKEN_ID, VOCABULARY = 0, 1, 99
PATCH_SIZE, GRID, SEMANTIC_SLOTS = 4, (2, 2), 3
GRANULARITIES = [
    {"name": "coarse", "stride": 2, "clusters": 2, "keep": 1},
    {"name": "fine", "stride": 1, "clusters": 4, "keep": 3},
]
IMAGE_TOKEN = "<image>"  # the processor's own default, which some tests rely on
# As multimodal checkpoints write theirs: contents are lists of parts, never strings.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    f"{{% if part['type'] == 'image' %}}{IMAGE_TOKEN}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Inputs:
    """The tiny model and batch that the mixin asks for: one image, one question and one prompt to each row."""

    is_training = True
    batch_size, seq_length = 7, 14
    hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 32, 37, 2, 2
    vocab_size = VOCABULARY

    def get_config(self):
        size = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
        return GranulonConfig(
            vision_config=DINOv3ViTConfig(**size, image_size=8, patch_size=PATCH_SIZE, num_register_tokens=1),
            text_config=Qwen2Config(
                **size,
                num_key_value_heads=2,
                vocab_size=VOCABULARY,
                max_position_embeddings=128,
                pad_token_id=PAD_TOKEN_ID,
                bos_token_id=None,
                eos_token_id=None,
            ),
            image_token_id=IMAGE_TOKEN_ID,
            granularities=GRANULARITIES,
            controller_hidden_size=16,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = common.ids_tensor((self.batch_size, self.seq_length), VOCABULARY)
        input_ids[:, 2 : 2 + GRID[0] * GRID[1] + SEMANTIC_SLOTS] = IMAGE_TOKEN_ID
        # Some tests cut the vocabulary by 15 and clamp input_ids only.
        question_ids = common.ids_tensor((self.batch_size, 5), VOCABULARY - 15)
        return self.get_config(), {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": common.floats_tensor((self.batch_size, 3, PATCH_SIZE * GRID[0], PATCH_SIZE * GRID[1])),
            "question_input_ids": question_ids,
            "question_attention_mask": torch.ones_like(question_ids),
        }


class GranulonModelTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (GranulonModel, GranulonForConditionalGeneration)
    additional_model_inputs = ["pixel_values", "question_input_ids", "question_attention_mask"]
    test_can_init_all_missing_weights_before_2023 = True
    # The controller learns from the trainer's losses; the loss of the next token gives it no gradient.
    test_all_params_have_gradient = False
    _is_composite = True
    model_tester = Inputs()

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs=None):
        """The test watches the first checkpointing layer it meets; from this end that is not the frozen tower's."""
        modules = GranulonForConditionalGeneration.modules
        with patch.object(GranulonForConditionalGeneration, "modules", lambda model: reversed(list(modules(model)))):
            super().check_training_gradient_checkpointing(gradient_checkpointing_kwargs)

    def test_model_outputs_equivalence(self):
        """The test subtracts every output, which torch refuses for masks."""
        subtract = torch.Tensor.__sub__

        def difference(a, b):
            return (a ^ b).long() if a.dtype == torch.bool else subtract(a, b)

        with patch.object(torch.Tensor, "__sub__", difference):
            super().test_model_outputs_equivalence()


for name, reason in SKIPS.items():
    setattr(GranulonModelTest, name, unittest.skip(reason)(getattr(GranulonModelTest, name)))


class GranulonConfigTest(unittest.TestCase):
    model_tester = Inputs()

    def test_config(self):
        configuration.ConfigTester(self, config_class=GranulonConfig, has_text_modality=False).run_common_tests()


class GranulonProcessorTest(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = GranulonProcessor

    @classmethod
    def _setup_image_processor(cls):
        return ViTImageProcessorPil(size={"height": PATCH_SIZE * GRID[0], "width": PATCH_SIZE * GRID[1]})

    @classmethod
    def _setup_tokenizer(cls):
        return byte_tokenizer([*CHAT_TOKENS, IMAGE_TOKEN])

    @staticmethod
    def prepare_processor_dict():
        return {
            "patch_size": PATCH_SIZE,
            "num_semantic_tokens": SEMANTIC_SLOTS,
            "image_token": IMAGE_TOKEN,
            "chat_template": CHAT_TEMPLATE,
        }
