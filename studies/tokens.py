"""What the study puts in place of adaptive token aggregation: other ways to make K tokens of N patches.

Each module is called as `AdaptiveTokenAggregation` is and returns the same `AggregationOutput`, so that a model takes
it as `model.model.aggregation`. None of them looks at the attention.

Shapes by suffix: I images, N patches of the H x W grid, K tokens, D feature width.
"""

import numpy as np
import torch
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor, nn

from modeling_granulon.adaptive_token_aggregation import (
    AdaptiveTokenAggregation,
    AggregationOutput,
    Groups,
    geometry,
)

from . import world

SEMANTIC, GRID, RANDOM, COLOUR, LEARNED = SOURCES = "semantic", "grid", "random", "colour", "learned"


class GridCells(nn.Module):
    """Average pooling: K cells of a grid as square as K allows, in reading order. Cells differ by a patch at most."""

    def forward(self, features, attention, alpha, beta, grid, top_k) -> AggregationOutput:
        rows, columns = cells_of(top_k)
        row_N, column_N = places_of(grid, features.device).unbind(-1)
        cell_N = row_N * rows // grid[0] * columns + column_N * columns // grid[1]
        return means_of(features, cell_N.expand(features.shape[:2]), grid, top_k)


class RandomClusters(nn.Module):
    """K patches drawn at random, and around each the patches that are nearer to it than to the others.

    The draw is a hash of the patch's own features: no random state, and no image depends on the batch.
    """

    def forward(self, features, attention, alpha, beta, grid, top_k) -> AggregationOutput:
        place_N2 = places_of(grid, features.device).float()
        wave_D = torch.arange(features.shape[-1], device=features.device).float().sin()
        draw_IN = ((features.float() @ wave_D).sin() * 43758.5453).frac().abs()
        seeds_IK2 = place_N2[draw_IN.topk(top_k, dim=-1).indices]
        nearest_IN = torch.cdist(place_N2.expand(len(features), -1, -1), seeds_IK2).argmin(-1)
        return means_of(features, nearest_IN, grid, top_k)


class ColourClusters(nn.Module):
    """Clusters of the patches' mean colours, seeded, refined and filtered as the method's own clusters are.

    Set `colours` (I,N,3), in [0, 1], to those of the images before each call.
    """

    def __init__(self, iterations: int = 2):
        super().__init__()
        self.cluster = AdaptiveTokenAggregation(relation_weight=0.0, iterations=iterations)
        self.colours = None

    def forward(self, features, attention, alpha, beta, grid, top_k) -> AggregationOutput:
        # Even small differences within an image count; clusters are compared by direction, and the constant keeps dark
        # and light apart.
        colours_IN3 = self.colours - self.colours.mean(1, keepdim=True)
        colours_IN3 = colours_IN3 / colours_IN3.std((1, 2), keepdim=True).clamp_min(1e-6)
        colours_IN4 = torch.cat([colours_IN3, torch.ones_like(colours_IN3[..., :1])], dim=-1)
        found = self.cluster(colours_IN4, None, alpha, beta, grid, top_k)
        means = means_of(features, found.assignment.flatten(1), grid, top_k)
        return found._replace(tokens=means.tokens)


class LearnedTokens(nn.Module):
    """K learned queries that attend to the patches; the assignment is each patch's most attentive query.

    Their geometry is zero: a token has weights on all patches, and its slot tells which query it is.
    """

    def __init__(self, width: int, tokens: int, heads: int = 4):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, width))
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, features, attention, alpha, beta, grid, top_k) -> AggregationOutput:
        patches_IND = features.to(self.queries.dtype)
        queries_IKD = self.queries[:top_k].expand(len(features), -1, -1)
        tokens_IKD, weights_IKN = self.attend(queries_IKD, patches_IND, patches_IND)
        mask_IK = torch.ones(weights_IKN.shape[:2], dtype=torch.bool, device=features.device)
        assignment_IHW = weights_IKN.argmax(1).unflatten(1, grid)
        return AggregationOutput(
            tokens_IKD.to(features.dtype),
            mask_IK,
            assignment_IHW,
            weights_IKN.amax(-1).detach().float(),
            torch.zeros(*mask_IK.shape, 5, device=features.device),
        )


def make_aggregation(source: str, width: int, tokens: int) -> nn.Module:
    """The module that takes the method's place."""
    if source == LEARNED:
        return LearnedTokens(width, tokens)
    return {GRID: GridCells, RANDOM: RandomClusters, COLOUR: ColourClusters}[source]()


def separation(assignment_SN: np.ndarray, scenes: list[world.Scene]) -> float:
    """
    How well groups of patches follow what the patches show, in the mean over scenes.

    Returns:
        `float`: adjusted mutual information, 0 for what chance gives and 1 for groups that are the things themselves.
    """
    shown_SN = [[" ".join(words) for words in scene.patch_words()] for scene in scenes]
    return float(np.mean([adjusted_mutual_info_score(*pair) for pair in zip(shown_SN, assignment_SN, strict=True)]))


def cells_of(tokens: int) -> tuple[int, int]:
    """Rows and columns of as many cells, as square as can be."""
    rows = next(rows for rows in range(int(tokens**0.5), 0, -1) if tokens % rows == 0)
    return rows, tokens // rows


def places_of(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Row and column of each patch, (N,2) long."""
    index_N = torch.arange(grid[0] * grid[1], device=device)
    return torch.stack([index_N // grid[1], index_N % grid[1]], dim=-1)


def means_of(features: Tensor, cluster_IN: Tensor, grid: tuple[int, int], tokens: int) -> AggregationOutput:
    """The mean feature and the geometry of each cluster, none of them empty; scores are the shares of patches."""
    groups = Groups.of(cluster_IN, tokens)
    tokens_IKD = groups.means(features.float()).to(features.dtype)
    share_IK = groups.count_IK / cluster_IN.shape[1]
    mask_IK, assignment_IHW = groups.count_IK > 0, cluster_IN.unflatten(1, grid)
    return AggregationOutput(tokens_IKD, mask_IK, assignment_IHW, share_IK, geometry(groups, grid))
