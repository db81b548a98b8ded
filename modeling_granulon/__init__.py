"""Granulon for transformers. Importing the package registers its classes with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .adaptive_token_aggregation import AdaptiveTokenAggregation
from .configuration_granulon import GranulonConfig
from .granularity_controller import GranularityController
from .image_io import load_rgb
from .modeling_granulon import GranulonForConditionalGeneration, GranulonModel
from .processing_granulon import GranulonProcessor

AutoConfig.register(GranulonConfig.model_type, GranulonConfig)
AutoModel.register(GranulonConfig, GranulonModel)
AutoModelForImageTextToText.register(GranulonConfig, GranulonForConditionalGeneration)
AutoProcessor.register(GranulonConfig, GranulonProcessor)

__all__ = [
    "AdaptiveTokenAggregation",
    "GranularityController",
    "GranulonConfig",
    "GranulonForConditionalGeneration",
    "GranulonModel",
    "GranulonProcessor",
    "load_rgb",
]
