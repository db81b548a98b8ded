"""Patch features and a relation map from any supported vision tower, which stays as it is.

The towers run their fast attention, which keeps no attention map. The map of the last layer is computed again from its
queries and keys, in bands whose columns are summed at once, so that an image of many patches never needs it whole.

Shapes by suffix: I images, H x W patch grid, N = H * W patches, T tokens (prefix tokens, then patches), M pooled
patches, A attention heads, D vision width, C width of a head, R patches of a few rows of the grid.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import get_ident

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

CONVNEXT = "dinov3_convnext"
SIGLIP2 = "siglip2_vision_model"
FIXED_SIZE = ("clip_vision_model", "siglip_vision_model")
TOWERS = ("dinov3_vit", CONVNEXT, "dinov2", "dinov2_with_registers", *FIXED_SIZE, SIGLIP2)

# Query and key projections of an attention module; the second pair is DINOv2's in transformers 5.17.
PROJECTIONS = (("q_proj", "k_proj"), ("query", "key"))

# Patches per side of the squares over which the columns of the relation map are summed: 4 costs no things found
# (benchmarks/results/things.md) and makes the map sixteen times smaller.
COLUMN_STRIDE = 4

# Attention weights held at a time: 4 MB in fp32, which a CPU's cache holds; elsewhere 32 MB, for few kernel launches.
SCRATCH = {"cpu": 2**20, "other": 2**23}


def check_tower(vision_config, layer: int = -1) -> None:
    """Raises ValueError for a tower, a patch size or a feature layer that cannot be used."""
    if vision_config.model_type not in TOWERS:
        raise ValueError(
            f"vision_config has model_type {vision_config.model_type!r}; supported are {', '.join(TOWERS)}. Of a "
            "model of images and text, pass its vision_config"
        )
    if vision_config.model_type == CONVNEXT:
        if layer != -1:
            raise ValueError(f"layer is {layer}, but the stages of a ConvNeXt differ in size; only -1 can be used")
    elif not isinstance(vision_config.patch_size, int):
        raise ValueError(f"patch_size is {vision_config.patch_size}; it must be one int")
    elif not -vision_config.num_hidden_layers - 1 <= layer <= vision_config.num_hidden_layers:
        raise ValueError(f"layer is {layer}, but the tower has {vision_config.num_hidden_layers} layers")


def patch_size_of(vision_config) -> int:
    """Pixels per side of a patch; of a ConvNeXt, its total stride."""
    if vision_config.model_type == CONVNEXT:
        return 4 * 2 ** (len(vision_config.hidden_sizes) - 1)
    return vision_config.patch_size


def feature_width_of(vision_config) -> int:
    """D, the width of the patch features."""
    return vision_config.hidden_sizes[-1] if vision_config.model_type == CONVNEXT else vision_config.hidden_size


def patch_grid(vision_config, pixel_values: Tensor) -> tuple[int, int]:
    """(H, W) of images (I, channels, h, w). Raises ValueError for another shape, or if patches do not divide it."""
    size, channels = patch_size_of(vision_config), vision_config.num_channels
    if pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
        raise ValueError(
            f"pixel_values have shape {tuple(pixel_values.shape)}, expected (images, {channels}, height, width)"
        )
    height, width = pixel_values.shape[2:]
    if height % size or width % size:
        raise ValueError(
            f"images are {height} x {width} pixels, which patches of {size} x {size} do not divide; resize them to "
            f"multiples of {size}"
        )
    return height // size, width // size


class RelationMap:
    """How much each patch of an image attends to each other patch (N, N); rows sum to 1. Computed when asked for.

    query (I, A, N, C), key (I, A, T, C) of the tokens, patches last; scale is that of their products.
    """

    def __init__(self, query: Tensor, key: Tensor, scale: float, grid: tuple[int, int]):
        self.query, self.key, self.scale, self.grid = query, key, scale, grid

    @classmethod
    def from_features(cls, features: Tensor, grid: tuple[int, int]) -> "RelationMap":
        """For a tower without attention: the row softmax of the cosine of the features (I, N, D)."""
        directions_IAND = F.normalize(features.float(), dim=-1)[:, None]
        return cls(directions_IAND, directions_IAND, 1.0, grid)

    def profiles(self, column_stride: int = 1, images: Tensor | None = None) -> Tensor:
        """The rows of the map (I, N, C) fp32 for all images or those that `images` (i,) names; rows sum to 1.

        Columns are summed over cells of column_stride x column_stride patches, so that C = ceil(H / column_stride) *
        ceil(W / column_stride). The map is made in bands of patches and, in a band, from a few heads at a time.
        """
        query_IANC, key_IATC = (x if images is None else x[images] for x in (self.query, self.key))
        device = query_IANC.device
        with torch.autocast(device.type, enabled=False) if device.type != "meta" else nullcontext():
            query_IANC, key_IATC = self.scale * query_IANC.float(), key_IATC.float()
            scratch = SCRATCH.get(device.type, SCRATCH["other"]) // (len(key_IATC) * key_IATC.shape[2])
            patches = min(max(1, scratch), query_IANC.shape[2])
            heads = max(1, scratch // patches)
            bands = query_IANC.split(patches, dim=2)
            return torch.cat([self._band(band, key_IATC, column_stride, heads) for band in bands], dim=1)

    def _band(self, query_IARC: Tensor, key_IATC: Tensor, column_stride: int, heads: int) -> Tensor:
        """Rows (I, R, C) of the scaled queries of R patches, some heads at a time."""
        height, width = self.grid
        attention_IRN = 0
        for query, key in zip(query_IARC.split(heads, dim=1), key_IATC.split(heads, dim=1), strict=True):
            weights_IART = (query @ key.mT).softmax(-1)
            attention_IRN = attention_IRN + weights_IART[..., -height * width :].sum(1)
        if column_stride > 1:
            map_IRHW = attention_IRN.unflatten(2, self.grid)  # (I,R,N) -> (I,R,H,W)
            attention_IRN = F.avg_pool2d(map_IRHW, column_stride, ceil_mode=True, divisor_override=1).flatten(2)
        # The sum over heads stands for their mean: renormalising removes the factor.
        return attention_IRN / attention_IRN.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


@dataclass
class VisionFeatures:
    """features (I, N, D) in the tower's dtype, their grid (H, W), their relation map, and the tower's own output."""

    features: Tensor
    grid: tuple[int, int]
    relation: RelationMap
    outputs: ModelOutput


def vision_features(tower: nn.Module, pixel_values: Tensor, layer: int = -1, **kwargs) -> VisionFeatures:
    """Features and relation map of images (I, 3, h, w), of any size that the patches divide.

    layer: -1 for the tower's last hidden state, else an index into its hidden states. The relation map is always that
    of the last layer. Further arguments go to the tower. Prefix tokens (CLS, registers) are dropped.

    Raises:
        ValueError: if the shape of the images or the layer does not fit the tower.
    """
    check_tower(tower.config, layer)
    grid = patch_grid(tower.config, pixel_values)
    kwargs |= tower_inputs(tower.config, pixel_values.to(tower.dtype), grid) | {"return_dict": True}
    if layer != -1:
        kwargs["output_hidden_states"] = True
    with last_attention(tower) as seen:
        outputs = tower(**kwargs)
    hidden_ITD = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
    features_IND = hidden_ITD[:, -grid[0] * grid[1] :]
    if tower.config.model_type == CONVNEXT:
        return VisionFeatures(features_IND, grid, RelationMap.from_features(features_IND, grid), outputs)

    heads = tower.config.num_attention_heads
    query_IATC, key_IATC = (seen[name].unflatten(2, (heads, -1)).transpose(1, 2) for name in ("query", "key"))
    if seen["positions"] is not None:
        query_IATC, key_IATC = rotate(query_IATC, *seen["positions"]), rotate(key_IATC, *seen["positions"])
    query_IANC = query_IATC[:, :, -grid[0] * grid[1] :]
    relation = RelationMap(query_IANC, key_IATC, query_IANC.shape[-1] ** -0.5, grid)
    return VisionFeatures(features_IND, grid, relation, outputs)


def tower_inputs(vision_config, pixel_values: Tensor, grid: tuple[int, int]) -> dict:
    """The tower's own arguments for images (I, 3, h, w) of any size."""
    if vision_config.model_type in FIXED_SIZE:
        return {"pixel_values": pixel_values, "interpolate_pos_encoding": True}
    if vision_config.model_type != SIGLIP2:
        return {"pixel_values": pixel_values}
    size = vision_config.patch_size
    tiles = pixel_values.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (I,3,h,w) -> (I,3,H,p,W,p)
    return {
        "pixel_values": tiles.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2),  # -> (I,N,p*p*3)
        "pixel_attention_mask": None,  # no image is padded
        "spatial_shapes": torch.tensor([grid] * len(pixel_values)),  # on the CPU: the tower reads its values there
    }


@contextmanager
def last_attention(tower: nn.Module):
    """While open, hooks keep `query` and `key` (I, T, D) and rotary `positions` or None of the last layer, in a dict.

    Only this thread's forward is kept, since others may run the same tower at the same time.
    """
    seen = {}
    thread = None if torch.compiler.is_compiling() else get_ident()  # torch.compile cannot trace get_ident

    def ours() -> bool:
        return torch.compiler.is_compiling() or thread in (None, get_ident())

    def keep(name):
        def hook(module, args, output):
            if ours():
                seen[name] = output

        return hook

    def keep_positions(module, args, kwargs):
        if ours():
            seen["positions"] = kwargs.get("position_embeddings")

    handles = []
    try:
        if tower.config.model_type != CONVNEXT:
            attention, query, key = find_last_attention(tower)
            handles.append(query.register_forward_hook(keep("query")))
            handles.append(key.register_forward_hook(keep("key")))
            handles.append(attention.register_forward_pre_hook(keep_positions, with_kwargs=True))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def find_last_attention(tower: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The attention module of the last layer, its query projection and its key projection."""
    for module in reversed(list(tower.modules())):
        children = dict(module.named_children())
        for query, key in PROJECTIONS:
            if query in children and key in children:
                return module, children[query], children[key]
    raise ValueError(f"no query and key projections found in {type(tower).__name__}")


def rotate(tokens_IATC: Tensor, cos_NC: Tensor, sin_NC: Tensor) -> Tensor:
    """Rotary position embedding of the patches, as the tower does it; prefix tokens stay as they are."""
    prefix, patches = tokens_IATC.split([tokens_IATC.shape[2] - len(cos_NC), len(cos_NC)], dim=2)
    first, second = patches.chunk(2, dim=-1)
    return torch.cat([prefix, patches * cos_NC + torch.cat([-second, first], dim=-1) * sin_NC], dim=2)
