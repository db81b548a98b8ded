"""Granulon in vLLM: our tower, aggregation and projector before vLLM's decoder, at the level that a question asks for.

vLLM finds `register` through the entry-point group `vllm.general_plugins` and calls it in each of its processes.
"""

MODE = "granulon"  # of tokenizer and renderer, in vLLM's registries


def register():
    """Make vLLM know the model, its renderer, and that the two belong together."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    import modeling_granulon  # noqa: F401  its configuration is known to AutoConfig from here on

    class UseRenderer(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_model_config(model_config):
            model_config.tokenizer_mode = MODE

    architecture = "GranulonForConditionalGeneration"
    if architecture in MODELS_CONFIG_MAP:
        return
    MODELS_CONFIG_MAP[architecture] = UseRenderer
    ModelRegistry.register_model(architecture, f"{__name__}.model:{architecture}")
    TokenizerRegistry.register(MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.register(MODE, f"{__name__}.renderer", "GranulonRenderer")
