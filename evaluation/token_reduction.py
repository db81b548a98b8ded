"""Other methods that make K tokens of N patches, re-implemented compactly from their papers and code.

Each takes features (I, N, D) and returns its tokens (I, K, D) and the token that each patch went to, (I, N), -1 for a
patch that went to none. `replaced` puts one of them where the aggregation is, `fastv_answer` answers with image tokens
that are dropped within the language model. Shapes by suffix: I images, N patches, K tokens, D feature width, T tokens
of the prompt, E text width.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from modeling_granulon.adaptive_token_aggregation import (
    AdaptiveTokenAggregation,
    AggregationOutput,
    Groups,
    geometry,
)
from modeling_granulon.image_tokens import PIXEL

FASTV_LAYER = 2  # layers that read all image tokens
SMALLER = "smaller image"  # the method whose patches are those of another picture
KMEANS_ROUNDS = 5  # as many as the aggregation has in all
NEIGHBOURS = 32  # patches that PruMerge adds to a kept one


def grid_cells(features: Tensor, kept: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Average pooling: a grid of cells as square as `kept` allows."""
    label_N = cells(kept, grid, features.device)
    member_KN = (label_N == torch.arange(kept, device=features.device)[:, None]).to(features.dtype)
    return member_KN / member_KN.sum(-1, keepdim=True) @ features, label_N.expand(features.shape[:2])


def cells(count: int, grid: tuple[int, int], device: torch.device) -> Tensor:
    """The cell of each patch, (N,) long, of `grid_shape(count)` cells in reading order."""
    rows, columns = grid_shape(count)
    row_N, column_N = torch.cartesian_prod(*map(torch.arange, grid)).to(device).unbind(-1)
    return row_N * rows // grid[0] * columns + column_N * columns // grid[1]


def grid_shape(count: int) -> tuple[int, int]:
    """Rows and columns of as many cells, as square as possible."""
    rows = next(rows for rows in range(int(count**0.5), 0, -1) if count % rows == 0)
    return rows, count // rows


def hashed(features: Tensor) -> Tensor:
    """A number of each patch (I,N) that looks random, and depends on nothing but its own features."""
    wave_D = torch.arange(features.shape[-1], device=features.device).float().sin()
    return ((features.float() @ wave_D).sin() * 43758.5453).frac().abs()


def random_patches(features: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Patches that a hash of their own features chooses: they do not depend on the batch or a random state."""
    return _chosen(features, hashed(features).topk(kept).indices)


def tome(features: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Token merging: every other patch joins its most similar partner, at most half a step, until `kept` are left."""
    size_IN1 = features.new_ones(*features.shape[:2], 1)
    label_IN = torch.arange(features.shape[1], device=features.device).expand(features.shape[:2])
    while features.shape[1] > kept:
        count = features.shape[1]
        merged = min(count // 2, count - kept)
        unit_IND = F.normalize(features, dim=-1)
        best = (unit_IND[:, ::2] @ unit_IND[:, 1::2].mT).max(-1)
        order_IN = best.values.argsort(-1, descending=True)
        stay_IN, source_IN = order_IN[:, merged:], order_IN[:, :merged]
        target_IN = best.indices.gather(1, source_IN)
        parts = []
        for values in (features * size_IN1, size_IN1):
            span = (-1, -1, values.shape[-1])
            source = values[:, ::2].gather(1, source_IN[..., None].expand(span))
            target_IND = target_IN[..., None].expand(span)
            target = values[:, 1::2].scatter_reduce(1, target_IND, source, reduce="sum")
            parts.append(torch.cat([values[:, ::2].gather(1, stay_IN[..., None].expand(span)), target], dim=1))
        features, size_IN1 = parts[0] / parts[1], parts[1]
        place_IN = torch.empty(len(features), count, dtype=torch.long, device=features.device)  # old token -> new one
        stays = torch.arange(stay_IN.shape[1], device=features.device)
        place_IN[:, 1::2] = len(stays) + torch.arange(count // 2, device=features.device)
        place_IN.scatter_(1, 2 * stay_IN, stays.expand_as(stay_IN))
        place_IN.scatter_(1, 2 * source_IN, len(stays) + target_IN)
        label_IN = place_IN.gather(1, label_IN)
    return features, label_IN


def visionzip(features: Tensor, attention: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Half of the tokens are the most attended patches; the rest joins the nearest of evenly spaced patches."""
    width, dominant = features.shape[-1], kept // 2
    order_IN = attention.sum(1).argsort(-1, descending=True)
    chosen_IND = features.gather(1, order_IN[:, :dominant, None].expand(-1, -1, width))
    rest = order_IN[:, dominant:].sort(-1).values
    rest_IND = features.gather(1, rest[..., None].expand(-1, -1, width))
    unit_IND = F.normalize(rest_IND, dim=-1)
    anchors = torch.arange(kept - dominant, device=features.device) * (rest.shape[1] // (kept - dominant))
    label_IN1 = (unit_IND @ unit_IND[:, anchors].mT).argmax(-1, keepdim=True)
    member_INK = features.new_zeros(*rest.shape, len(anchors)).scatter_(2, label_IN1, 1)
    merged_IKD = member_INK.mT @ rest_IND / member_INK.sum(1)[..., None].clamp_min(1)
    label_IN = torch.arange(dominant, device=features.device).expand(len(features), -1)
    label_IN = torch.cat([label_IN, dominant + label_IN1[..., 0]], dim=1)
    label_IN = torch.empty_like(label_IN).scatter_(1, torch.cat([order_IN[:, :dominant], rest], dim=1), label_IN)
    return torch.cat([chosen_IND, rest_IND[:, anchors] + merged_IKD], dim=1), label_IN


def prumerge(features: Tensor, attention: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The most attended patches, to each of which its most similar others are added, weighted by their attention."""
    received_IN, unit_IND = attention.sum(1), F.normalize(features, dim=-1)
    chosen_IK = received_IN.topk(kept).indices
    tokens_IKD, label_IN = _chosen(features, chosen_IK)
    similar_IKN = _rows(unit_IND, chosen_IK) @ unit_IND.mT
    similar_IKN = similar_IKN.masked_fill((label_IN >= 0)[:, None], -torch.inf)
    near_IKM = similar_IKN.topk(min(NEIGHBOURS, features.shape[1] - kept)).indices
    weight_IKM = received_IN[:, None].expand_as(similar_IKN).gather(2, near_IKM)
    weight_IKM = weight_IKM / weight_IKM.sum(-1, keepdim=True)
    weight_IKN = torch.zeros_like(similar_IKN).scatter(2, near_IKM, weight_IKM)
    return tokens_IKD + weight_IKN @ features, label_IN


def every_patch(features: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """No reduction: of a smaller image."""
    return features, torch.arange(features.shape[1], device=features.device).expand(features.shape[:2])


def small_grid(tokens: int) -> tuple[int, int]:
    """Patches of a smaller image, rows and columns: at most `tokens`, as square as can be."""
    return int(tokens**0.5), tokens // int(tokens**0.5)


def nearest_level(config, tokens: int) -> int:
    """The level whose gains and embedding a number of tokens takes: the coarsest that keeps as many, or the last."""
    keeps = [entry["keep"] for entry in config.granularities]
    return next((number for number, keep in enumerate(keeps) if keep >= tokens), len(keeps) - 1)


def _rows(rows_IND: Tensor, chosen_IK: Tensor) -> Tensor:
    return rows_IND.gather(1, chosen_IK[..., None].expand(-1, -1, rows_IND.shape[-1]))


def _chosen(features: Tensor, chosen_IK: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen patches as tokens, in reading order; the others go to none."""
    chosen_IK = chosen_IK.sort(-1).values
    label_IN = torch.full(features.shape[:2], -1, device=features.device)
    slot_IK = torch.arange(chosen_IK.shape[1], device=features.device).expand_as(chosen_IK)
    return _rows(features, chosen_IK), label_IN.scatter(1, chosen_IK, slot_IK)


def kmeans(features: Tensor, kept: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """K-means on the patches: no pooling, no relation map, no filter."""
    found = AdaptiveTokenAggregation(0.0, KMEANS_ROUNDS, 0)(features, None, 1, kept, grid, kept)
    return found.tokens, found.assignment.flatten(1)


METHODS: dict[str, Callable] = {  # each with features, received attention (I,N,N), K and the grid
    "k-means": lambda features, attention, kept, grid: kmeans(features, kept, grid),
    "average pooling": lambda features, attention, kept, grid: grid_cells(features, kept, grid),
    SMALLER: lambda features, attention, kept, grid: every_patch(features, kept),
    "random patches": lambda features, attention, kept, grid: random_patches(features, kept),
    "ToMe": lambda features, attention, kept, grid: tome(features, kept),
    "VisionZip": lambda features, attention, kept, grid: visionzip(features, attention, kept),
    "PruMerge": lambda features, attention, kept, grid: prumerge(features, attention, kept),
}


class Reduction(nn.Module):
    """One of `METHODS` in the place of `AdaptiveTokenAggregation`; a token lies where its patches lie.

    In `assignment`, patches that went to no token have -1.
    """

    def __init__(self, method: str):
        super().__init__()
        self.method = METHODS[method]

    def forward(self, features, attention, alpha, beta, grid, top_k) -> AggregationOutput:
        kept = min(top_k, features.shape[1])
        tokens_IKD, label_IN = self.method(features.float(), attention, kept, grid)
        groups = Groups.of(torch.where(label_IN < 0, kept, label_IN), kept + 1)  # the last group: of no token
        geometry_IK5 = geometry(groups, grid)[:, :kept]
        unused = top_k - kept
        return AggregationOutput(
            F.pad(tokens_IKD.to(features.dtype), (0, 0, 0, unused)),
            (torch.arange(top_k, device=features.device) < kept).repeat(len(features), 1),
            label_IN.unflatten(1, grid),
            F.pad(groups.count_IK[:, :kept] / features.shape[1], (0, unused)),
            F.pad(geometry_IK5, (0, 0, 0, unused)),
        )


@contextmanager
def replaced(model, processor, level: int, tokens: int, method: str | None = None):
    """
    Within the block the level makes `tokens` semantic tokens of an image, by `method` in place of the aggregation.

    Args:
        method: one of `METHODS`; None for the aggregation itself.
    """
    base, candidate = model.model, model.config.granularities[level]
    before = dict(candidate), base.aggregation, model.config.max_semantic_tokens, processor.num_semantic_tokens
    candidate |= {"keep": tokens, "clusters": max(tokens, round(tokens * candidate["clusters"] / candidate["keep"]))}
    if method is not None:
        candidate |= {"stride": 1, "clusters": tokens}
        base.aggregation = Reduction(method)
        base._relation = lambda vision: vision.relation.profiles(1)
    most = max(entry["keep"] for entry in model.config.granularities)
    model.config.max_semantic_tokens = processor.num_semantic_tokens = most
    try:
        yield
    finally:
        candidate.update(before[0])
        base.aggregation, model.config.max_semantic_tokens, processor.num_semantic_tokens = before[1:]
        base.__dict__.pop("_relation", None)


@torch.no_grad()
def fastv_answer(model, inputs: dict, kept: int, max_new_tokens: int, end_ids: tuple[int, ...] = ()) -> list[int]:
    """
    The greedy answer to one prompt made for the pixel view, as FastV gives it.

    All image tokens are read by the first `FASTV_LAYER` layers; after them stay the `kept` ones to which the prompt's
    last token attends most in the last of these layers.

    Args:
        inputs: the processor's output for one row and `visual_view="pixel"`, with `granularity` if wanted.
    """
    base, decoder = model.model, model.model.language_model
    granularity = inputs.pop("granularity", None)
    visual = model.encode(**inputs, granularity=granularity)
    image_T = (inputs["input_ids"] == model.config.image_token_id)[0]
    states_1TE = base.get_input_embeddings()(inputs["input_ids"]).clone()
    layout = base.layout(image_T[None], visual=visual, visual_view=PIXEL)
    states_1TE[0, image_T] = visual.place(layout, PIXEL).embeds_BRE[0].to(states_1TE.dtype)
    place_T, cache, answer = torch.arange(len(image_T), device=image_T.device), DynamicCache(), []

    def run(layers, states_1TE, place_T):
        rotary = decoder.rotary_emb(states_1TE, place_T[None])
        for layer in layers:
            states_1TE = layer(
                states_1TE, attention_mask=None, position_ids=place_T[None], past_key_values=cache,
                position_embeddings=rotary,
            )  # fmt: skip
        return states_1TE

    before_1TE = run(decoder.layers[: FASTV_LAYER - 1], states_1TE, place_T)
    states_1TE = run([decoder.layers[FASTV_LAYER - 1]], before_1TE, place_T)
    weight_T = _last_attention(decoder, decoder.layers[FASTV_LAYER - 1], before_1TE, place_T, cache)
    stays_T = ~image_T
    stays_T[weight_T.masked_fill(~image_T, -1).topk(min(kept, int(image_T.sum()))).indices] = True
    states_1TE = run(decoder.layers[FASTV_LAYER:], states_1TE[:, stays_T], place_T[stays_T])
    for number in range(max_new_tokens):
        token = model.lm_head(decoder.norm(states_1TE[:, -1:])).argmax(-1)
        answer.append(int(token))
        if answer[-1] in end_ids or number + 1 == max_new_tokens:
            return answer
        states_1TE = base.get_input_embeddings()(token)
        states_1TE = run(decoder.layers, states_1TE, place_T[-1:] + 1 + number)
    return answer


def _last_attention(decoder, layer, states_1TE: Tensor, place_T: Tensor, cache: DynamicCache) -> Tensor:
    """What the last token attends to in a layer whose keys are in the cache: the mean over heads, (T,)."""
    attention = layer.self_attn
    normed_11E = layer.input_layernorm(states_1TE[:, -1:])
    query_HC = attention.q_proj(normed_11E).unflatten(-1, (-1, attention.head_dim))[0, 0]
    query_HC = attention.q_norm(query_HC) if hasattr(attention, "q_norm") else query_HC
    cos_C, sin_C = (part[0, 0] for part in decoder.rotary_emb(states_1TE, place_T[None, -1:]))
    first, second = query_HC.chunk(2, dim=-1)
    query_HC = query_HC * cos_C + torch.cat([-second, first], dim=-1) * sin_C
    key_HTC = cache.layers[attention.layer_idx].keys[0].repeat_interleave(attention.num_key_value_groups, 0)
    return (query_HC[:, None] @ key_HTC.mT * attention.scaling).softmax(-1).mean(0)[0]
