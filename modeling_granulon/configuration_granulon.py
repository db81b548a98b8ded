"""Configuration of Granulon: one vision tower, one language model, and the levels of granularity between them."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .vision_features import check_tower

VIEWS = ("full", "pixel", "semantic")
# Decoders whose first layer can be run on its own (Eq. 1) and whose masks can be packed (Eq. 10); each is tested.
TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")
DEFAULT_GRANULARITIES = (
    {"name": "coarse", "stride": 4, "clusters": 6, "keep": 5, "view": "full"},
    {"name": "medium", "stride": 2, "clusters": 12, "keep": 10, "view": "full"},
    {"name": "fine", "stride": 1, "clusters": 24, "keep": 20, "view": "full"},
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
        cluster_iterations (`int`): rounds of the relation-aware k-means (Eq. 5), the seeding included.
        relation_weight (`float`): lambda_f of Eq. 5.
        score_weights (`list[float]`): eta_1, eta_2, eta_3 of Eq. 6 (size, coherence, dispersion).
        vision_feature_layer (`int`): the tower's hidden state that holds the patch features; -1 is its normed output.
        projector_hidden_act, multimodal_projector_bias: the two-layer projector, as in Llava.
        controller_hidden_size (`int`): width of the question descriptor h (Eq. 2).

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
    relation_weight: float = 0.1
    score_weights: list | tuple = (1.0, 1.0, 1.0)
    vision_feature_layer: int = -1
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    controller_hidden_size: int = 256
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.vision_config = _sub_config(self.vision_config, "dinov3_vit")
        self.text_config = _sub_config(self.text_config, "qwen2")
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
        """Index of a level given by name or index.

        Raises:
            ValueError: if the model has no such level.
        """
        names = self.granularity_names
        if isinstance(granularity, str) and granularity in names:
            return names.index(granularity)
        if isinstance(granularity, int) and not isinstance(granularity, bool) and 0 <= granularity < len(names):
            return granularity
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
        if self.max_semantic_tokens < keep:
            raise ValueError(f"max_semantic_tokens is {self.max_semantic_tokens} but a level keeps {keep} tokens")
        if self.cluster_iterations < 1 or self.relation_weight < 0 or self.controller_hidden_size < 1:
            raise ValueError(
                "cluster_iterations and controller_hidden_size must be at least 1, relation_weight at least 0; found "
                f"{self.cluster_iterations}, {self.controller_hidden_size} and {self.relation_weight}"
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
    if "sliding_attention" in (getattr(text_config, "layer_types", None) or ()) or (
        text_config.model_type == "mistral" and text_config.sliding_window is not None
    ):
        raise ValueError(
            f"text_config ({text_config.model_type}) uses sliding-window attention, which would cut off the image; "
            "set sliding_window=None (and use_sliding_window=False)"
        )


GranulonConfig.register_for_auto_class()

__all__ = ["GranulonConfig"]
