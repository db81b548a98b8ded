"""What vLLM does with a request before the model runs: images are opened, levels chosen, places reserved."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache

import torch
from transformers import BatchFeature
from vllm.config import ModelConfig
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)
from vllm.multimodal.processing.inputs import ProcessorInputs

from modeling_granulon import GranulonProcessor, load_rgb
from modeling_granulon.adaptive_token_aggregation import kept_tokens
from modeling_granulon.image_tokens import FULL, PIXEL, SEMANTIC, VISUAL_VIEWS
from modeling_granulon.vision_features import patch_grid

from .levels import LevelChooser

OPTIONS = ("granularity", "visual_view")
VIEWS = (FULL, PIXEL, SEMANTIC)  # by the number that the model gets


def load_processor(model_config: ModelConfig) -> GranulonProcessor:
    return _load_processor(model_config.model, model_config.revision)


@lru_cache(maxsize=1)
def _load_processor(model: str, revision: str | None) -> GranulonProcessor:
    return GranulonProcessor.from_pretrained(model, revision=revision)


def token_count(config, grid: tuple[int, int], level: int, view: str) -> int:
    """Image tokens of an image of H x W patches; no level is -1."""
    candidate = config.granularities[level] if level >= 0 else None
    semantic = kept_tokens(grid, candidate["stride"], candidate["clusters"], candidate["keep"]) if candidate else 0
    return (view != SEMANTIC) * grid[0] * grid[1] + (view != PIXEL) * semantic


class ImageParser(MultiModalDataParser):
    """Opens images as everywhere else in Granulon: upright RGB with 8 bits, from the bytes where vLLM kept them."""

    def _parse_image_data(self, data):
        items = data if isinstance(data, list) else [data]
        return ImageProcessorItems([load_rgb(_source(item)) for item in items])


def _source(image):
    return image.original_bytes if isinstance(image, MediaWithBytes) else image


class GranulonProcessingInfo(BaseProcessingInfo):
    def get_hf_processor(self, **kwargs) -> GranulonProcessor:
        return load_processor(self.ctx.model_config)

    def get_supported_mm_processor_kwargs(self):
        return {}

    def get_supported_mm_limits(self):
        return {"image": None}

    def get_data_parser(self):
        return ImageParser(expected_hidden_size=self._get_expected_hidden_size())

    def get_mm_max_tokens_per_item(self, seq_len, mm_counts):
        size = self.image_size()
        grid = patch_grid(self.get_hf_config().vision_config, torch.empty(1, 3, *size))
        return {"image": token_count(self.get_hf_config(), grid, self.largest_level(), FULL)}

    def image_size(self) -> tuple[int, int]:
        """(h, w) of images as the tower gets them."""
        images = self.get_hf_processor().image_processor
        size = getattr(images, "crop_size", None) if getattr(images, "do_center_crop", False) else images.size
        return size["height"], size["width"]

    def largest_level(self) -> int:
        """The index of the level with the most tokens; -1 for a model without levels."""
        keeps = [level["keep"] for level in self.get_hf_config().granularities]
        return keeps.index(max(keeps)) if keeps else -1

    def choose(self, prompt: list[int], options: Mapping[str, object]) -> tuple[int, str]:
        """
        The level and view of a request.

        Args:
            prompt: token ids, with one placeholder for each image.
            options: `granularity` and `visual_view`, as `mm_processor_kwargs` of the request or of the server.

        Raises:
            ValueError: an unknown option, level or view.
        """
        config, given = self.get_hf_config(), self.ctx.get_merged_mm_kwargs(options)
        if unknown := sorted(set(given) - set(OPTIONS)):
            raise ValueError(f"mm_processor_kwargs has {', '.join(unknown)}; Granulon takes {' and '.join(OPTIONS)}")
        view, level = given.get("visual_view", "auto"), -1
        if view not in VISUAL_VIEWS:
            raise ValueError(f"visual_view is {view!r}; choose one of {VISUAL_VIEWS}")
        if given.get("granularity") is not None:
            level = config.granularity_index(given["granularity"])
        elif config.granularities:
            level = self._chosen_level(prompt)
        if level < 0:
            return level, PIXEL
        return level, config.granularities[level]["view"] if view == "auto" else view

    @cached_property
    def chooser(self) -> LevelChooser:
        model = self.ctx.model_config
        return LevelChooser(self.get_hf_config(), model.model, model.dtype, model.revision)

    def _chosen_level(self, prompt: list[int]) -> int:
        config = self.get_hf_config()
        if config.controller == "random":
            return int(torch.randint(len(config.granularities), ()))
        if config.controller != "learned":
            return config.granularity_index(config.controller)
        processor = self.get_hf_processor()
        question = processor.question(processor.tokenizer.decode(prompt))
        ids = tuple(processor.tokenizer(question, add_special_tokens=False)["input_ids"])
        if not ids or len(config.granularities) == 1:
            return config.granularity_index(config.default_granularity)
        return self.chooser.choose(ids)


class GranulonDummyInputs(BaseDummyInputsBuilder[GranulonProcessingInfo]):
    def get_dummy_text(self, mm_counts):
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len, mm_counts, mm_options):
        height, width = self.info.image_size()
        return {"image": self._get_dummy_images(width=width, height=height, num_images=mm_counts.get("image", 0))}


class GranulonMultiModalProcessor(BaseMultiModalProcessor[GranulonProcessingInfo]):
    def get_dummy_inputs(self, seq_len, mm_counts, mm_options):
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        level = self.info.largest_level()
        most = {"visual_view": FULL} | ({"granularity": level} if level >= 0 else {})
        return replace(inputs, hf_processor_mm_kwargs=most)

    def apply(self, inputs: ProcessorInputs, timing_ctx):
        """As in vLLM, with the level and view chosen first: all cache keys of the images hold them."""
        level, view = self.info.choose(inputs.prompt, inputs.hf_processor_mm_kwargs)
        return super().apply(replace(inputs, hf_processor_mm_kwargs={"level": level, "view": view}), timing_ctx)

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        pixels = self.info.get_hf_processor().image_processor(hf_data["images"], return_tensors="pt")["pixel_values"]
        images = len(pixels)
        return BatchFeature(
            {
                "pixel_values": pixels.to(self.info.ctx.model_config.dtype),
                "level": torch.full((images,), hf_kwargs["level"]),
                "view": torch.full((images,), VIEWS.index(hf_kwargs["view"])),
            }
        )

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]):
        return {name: MultiModalFieldConfig.batched("image") for name in ("pixel_values", "level", "view")}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptReplacement]:
        config = self.info.get_hf_config()

        def placeholders(number: int) -> list[int]:
            pixels = out_mm_kwargs["image"][number]["pixel_values"].data
            grid = patch_grid(config.vision_config, pixels.unsqueeze(0))
            count = token_count(config, grid, hf_processor_mm_kwargs["level"], hf_processor_mm_kwargs["view"])
            return [config.image_token_id] * count

        return [PromptReplacement(modality="image", target=[config.image_token_id], replacement=placeholders)]

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        """A rendered prompt begins with the BOS token of its template; the tokenizer may have added another."""
        bos = self.info.get_tokenizer().bos_token_id
        return prompt[1:] if bos is not None and prompt[:2] == [bos, bos] else prompt
