"""Configuration of Granulon: one vision tower, one language model, and the levels of granularity between them."""

from numbers import Integral

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .image_tokens import VIEWS
from .vision_features import check_tower

# Decoders whose first layers can be run on their own (Eq. 2) and whose masks can be packed (Eq. 10); each is tested.
TEXT_MODELS = ("llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
# Chosen on composed photographs with true masks: benchmarks/results/things.md.
DEFAULT_GRANULARITIES = (
    {"name": "coarse", "stride": 2, "clusters": 6, "keep": 5, "view": "full"},
    {"name": "medium", "stride": 2, "clusters": 12, "keep": 10, "view": "full"},
    {"name": "fine", "stride": 2, "clusters": 24, "keep": 20, "view": "full"},
)
AUTO_MAP = {
    "AutoConfig": "configuration_granulon.GranulonConfig",
    "AutoModel": "modeling_granulon.GranulonModel",
    "AutoModelForImageTextToText": "modeling_granulon.GranulonForConditionalGeneration",
    "AutoProcessor": "processing_granulon.GranulonProcessor",
}


@strict
class GranulonConfig(PreTrainedConfig):
    r"""
    Everything that shapes a Granulon model.

    Args:
        vision_config (`dict` or `PreTrainedConfig`): the tower; DINOv3 ViT by default.
        text_config (`dict` or `PreTrainedConfig`): the language model; Qwen2 by default.
        image_token_id (`int`): the one placeholder id, used for pixel and semantic slots alike.
        granularities (`list[dict]`): the candidates g_k of Eq. 1, from coarse to fine, each with `name`, `stride`
            (alpha), `clusters` (beta), `keep` (K semantic tokens) and `view` (what `visual_view="auto"` shows).
            `[]` is the plain encoder, one entry a fixed granularity.
        default_granularity (`str` or `int`): the level of an image without a question; the middle one by default.
        controller (`str`): `"learned"`, or for ablations `"random"` or the name of a fixed level.
        max_semantic_tokens (`int`): K_max, the semantic slots reserved for an image; the largest `keep` by default.
        cluster_iterations (`int`): rounds of the relation-aware k-means on pooled cells (Eq. 5), seeding included.
        refinement_iterations (`int`): further rounds in which every patch joins its nearest centre.
        relation_weight (`float`): lambda_f of Eq. 5.
        score_weights (`list[float]`): eta_1, eta_2, eta_3 of Eq. 6 (size, coherence, dispersion).
        vision_feature_layer (`int`): the tower's hidden state that holds the patch features; -1 is its normed output.
            By default -2 for CLIP, as in Llava, and -1 for the others.
        projector_hidden_act, multimodal_projector_bias: the two-layer projector, as in Llava.
        controller_hidden_size (`int`): width of the question descriptor h (Eq. 2).
        controller_layers (`int`): decoder layers that the controller reads the question through; 1 in the paper.

    Raises:
        ValueError: on an unsupported tower or decoder, or on candidates that contradict each other.
    """

    model_type = "granulon"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151655
    granularities: list | tuple | None = None
    default_granularity: str | int | None = None
    controller: str = "learned"
    max_semantic_tokens: int | None = None
    cluster_iterations: int = 2
    refinement_iterations: int = 3
    relation_weight: float = 3.0
    score_weights: list | tuple = (1.0, 1.0, 1.0)
    vision_feature_layer: int | None = None
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    controller_hidden_size: int = 256
    controller_layers: int = 1
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.vision_config = _sub_config(self.vision_config, "dinov3_vit")
        self.text_config = _sub_config(self.text_config, "qwen2")
        if self.vision_feature_layer is None:
            self.vision_feature_layer = -2 if self.vision_config.model_type == "clip_vision_model" else -1
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        self.granularities = [_candidate(entry) for entry in _or_default(self.granularities, DEFAULT_GRANULARITIES)]
        if self.default_granularity is None and self.granularities:
            self.default_granularity = self.granularities[len(self.granularities) // 2]["name"]
        keep = max((entry["keep"] for entry in self.granularities), default=0)
        self.max_semantic_tokens = _or_default(self.max_semantic_tokens, keep)
        self.score_weights = list(self.score_weights)
        super().__post_init__(**kwargs)
        # Every Auto class must find its remote class, whichever part of the model is saved.
        self.auto_map = {**AUTO_MAP, **(getattr(self, "auto_map", None) or {})}
        self._check()

    @property
    def granularity_names(self) -> list[str]:
        return [entry["name"] for entry in self.granularities]

    def granularity_index(self, granularity: str | int) -> int:
        """Index of a level given by name or index; the index may be text, as on a command line.

        Raises:
            ValueError: if the model has no such level.
        """
        names = self.granularity_names
        if not names:
            raise ValueError(f"granularity is {granularity!r}, but this model has no levels; leave it out")
        if isinstance(granularity, str) and granularity in names:
            return names.index(granularity)
        if isinstance(granularity, str) and granularity.isdecimal():
            granularity = int(granularity)
        is_number = isinstance(granularity, Integral) and not isinstance(granularity, bool)
        if is_number and 0 <= granularity < len(names):
            return int(granularity)
        raise ValueError(f"unknown granularity {granularity!r}: choose one of {names} or an index below {len(names)}")

    def _check(self):
        check_tower(self.vision_config, self.vision_feature_layer)
        _check_decoder(self.text_config)
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"image_token_id is {self.image_token_id} but the vocabulary has {self.text_config.vocab_size} "
                "entries; name a token of the tokenizer"
            )
        names = self.granularity_names
        if len(set(names)) != len(names):
            raise ValueError(f"granularity names must be unique, found {names}")
        order = [(-entry["stride"], entry["clusters"]) for entry in self.granularities]
        if order != sorted(order):
            raise ValueError(f"granularities must go from coarse to fine (stride down, clusters up), found {names}")
        if self.granularities:
            self.granularity_index(self.default_granularity)
        if self.controller not in ("learned", "random", *names):
            raise ValueError(f"controller is {self.controller!r}; choose 'learned', 'random' or one of {names}")
        keep = max((entry["keep"] for entry in self.granularities), default=0)
        if self.max_semantic_tokens < keep or (self.max_semantic_tokens and not names):
            raise ValueError(f"max_semantic_tokens is {self.max_semantic_tokens} but the levels keep {keep} at most")
        smallest = {"cluster_iterations": 1, "refinement_iterations": 0, "controller_hidden_size": 1}
        smallest |= {"controller_layers": 1, "relation_weight": 0}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, found {getattr(self, name)}")
        if self.controller_layers > self.text_config.num_hidden_layers:
            raise ValueError(
                f"controller_layers is {self.controller_layers}, but the language model has "
                f"{self.text_config.num_hidden_layers} layers"
            )
        if len(self.score_weights) != 3 or min(self.score_weights) < 0:
            raise ValueError(f"score_weights must be three non-negative numbers, found {self.score_weights}")


def _or_default(value, default):
    return default if value is None else value


def _sub_config(config, default_type: str) -> PreTrainedConfig:
    if isinstance(config, dict):
        return AutoConfig.for_model(**{"model_type": default_type, **config})
    return AutoConfig.for_model(default_type) if config is None else config


def _candidate(entry) -> dict:
    """A complete, checked copy of one candidate (alpha, beta, K and view)."""
    if not isinstance(entry, dict):
        raise ValueError(f"a granularity is a dict such as {DEFAULT_GRANULARITIES[0]}, found {entry!r}")
    missing = {"name", "stride", "clusters"} - entry.keys()
    unknown = entry.keys() - DEFAULT_GRANULARITIES[0].keys()
    if missing or unknown:
        raise ValueError(f"granularity {entry}: missing {sorted(missing)}, unknown {sorted(unknown)}")
    entry = {"keep": entry["clusters"], "view": "full", **entry}
    numbers = [entry[key] for key in ("stride", "clusters", "keep")]
    if not isinstance(entry["name"], str) or any(type(number) is not int or number < 1 for number in numbers):
        raise ValueError(f"granularity {entry}: name must be text, stride, clusters and keep whole numbers above 0")
    if entry["keep"] > entry["clusters"]:
        raise ValueError(f"granularity {entry['name']!r} keeps {entry['keep']} of {entry['clusters']} clusters")
    if entry["view"] not in VIEWS:
        raise ValueError(f"granularity {entry['name']!r} has view {entry['view']!r}; choose one of {VIEWS}")
    return {key: entry[key] for key in DEFAULT_GRANULARITIES[0]}


def _check_decoder(text_config):
    if text_config.model_type not in TEXT_MODELS:
        raise ValueError(
            f"text_config has model_type {text_config.model_type!r}, which Granulon has not been tested with; "
            f"choose one of {TEXT_MODELS}"
        )
    layer_types = getattr(text_config, "layer_types", None)
    # Mistral and Phi-3 have no layer types: a window is that of all layers. One as long as the context cuts nothing.
    window = getattr(text_config, "sliding_window", None) or text_config.max_position_embeddings
    has_window = layer_types is None and window < text_config.max_position_embeddings
    if has_window or "sliding_attention" in (layer_types or ()):
        raise ValueError(
            f"text_config ({text_config.model_type}) uses sliding-window attention, which would cut off the image; "
            "set sliding_window=None (and use_sliding_window=False)"
        )


GranulonConfig.register_for_auto_class()

__all__ = ["GranulonConfig"]
