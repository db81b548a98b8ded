"""The model that vLLM runs: image tokens from `GranulonVisualEncoder`, the rest from vLLM's own decoder."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from modeling_granulon.visual_encoder import GranulonVisualEncoder

from .processing import VIEWS, GranulonDummyInputs, GranulonMultiModalProcessor, GranulonProcessingInfo

VISUAL = ("model.vision_tower.", "model.multi_modal_projector.")
CONTROLLER = "model.granularity_controller."  # has chosen the level before (levels.py)


@MULTIMODAL_REGISTRY.register_processor(
    GranulonMultiModalProcessor, info=GranulonProcessingInfo, dummy_inputs=GranulonDummyInputs
)
class GranulonForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP):
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return None  # chat templates write the placeholder of each image

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self.dtype = vllm_config.model_config.dtype
        config.text_config.tie_word_embeddings = config.tie_word_embeddings
        self.configure_mm_token_handling(
            vocab_size=config.text_config.vocab_size, mm_token_ids=[config.image_token_id]
        )
        with self._mark_tower_model(vllm_config, "image"):
            self.visual = GranulonVisualEncoder(config).eval()
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.text_config.model_type]],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs) -> list[torch.Tensor]:
        """The image tokens of each image, (tokens, E): those of its level and view, none that is empty."""
        pixels, levels, views = kwargs.get("pixel_values"), kwargs.get("level"), kwargs.get("view")
        if pixels is None:
            return []
        groups = {}
        for number, choice in enumerate(zip(_numbers(levels), _numbers(views), strict=True)):
            groups.setdefault((*choice, pixels[number].shape), []).append(number)
        tokens = [None] * len(pixels)
        for (level, view, _), numbers in groups.items():
            features = self.visual.get_image_features(
                torch.stack([pixels[number] for number in numbers]),
                granularity=level if level >= 0 else None,
                visual_view=VIEWS[view],
            ).pooler_output
            for number, feature in zip(numbers, features, strict=True):
                tokens[number] = feature.to(self.dtype)
        return tokens

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        inputs_embeds = None if intermediate_tensors is not None else inputs_embeds
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """transformers reads the tower, whose names in files differ from those of its modules; vLLM the decoder."""
        visual = {}

        def of_decoder():
            for name, tensor in weights:
                if name.startswith(VISUAL):
                    visual[name] = tensor
                elif not name.startswith(CONTROLLER):
                    yield name, tensor

        loaded = AutoWeightsLoader(self).load_weights(of_decoder(), mapper=self.hf_to_vllm_mapper)
        encoder, report = GranulonVisualEncoder.from_pretrained(
            None, config=self.config, state_dict=visual, dtype=self.dtype, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"the checkpoint lacks {sorted(report['missing_keys'])[:3]} of the visual part")
        device = next(self.visual.parameters()).device
        self.visual = encoder.eval().to(device)
        return loaded | {f"visual.{name}" for name, _ in self.visual.named_parameters()}


def _numbers(values) -> list[int]:
    return [int(value) for value in values]
