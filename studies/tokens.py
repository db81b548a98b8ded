"""Other methods that make K tokens of N patches, in place of adaptive token aggregation.

Each module is called like `AdaptiveTokenAggregation` and returns the same `AggregationOutput`, so that it can replace
`model.model.aggregation`. None of them reads the attention.

Shapes by suffix: I images, N patches of the H x W grid, K tokens, D feature width, S scenes.
"""

import numpy as np
import torch
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor, nn

from granulon.evaluation.token_reduction import cells, hashed
from modeling_granulon.adaptive_token_aggregation import (
    AdaptiveTokenAggregation,
    AggregationOutput,
    Groups,
    geometry,
)

from . import world

SEMANTIC, GRID, RANDOM, COLOUR = SOURCES = "semantic", "grid", "random", "colour"


class GridCells(nn.Module):
    """Average pooling over K cells of a grid as square as K allows, in reading order."""

    def forward(self, features, attention, alpha, beta, grid, top_k) -> AggregationOutput:
        cell_N = cells(top_k, grid, features.device)
        return cluster_means(features, cell_N.expand(features.shape[:2]), grid, top_k)


class RandomClusters(nn.Module):
    """K random patches, each with the patches that are nearest to it.

    The choice is a hash of the patch's own features, so that no image depends on the batch or a random state.
    """

    def forward(self, features, attention, alpha, beta, grid, top_k) -> AggregationOutput:
        place_N2 = torch.cartesian_prod(*(torch.arange(side, device=features.device) for side in grid)).float()
        seeds_IK2 = place_N2[hashed(features).topk(top_k, dim=-1).indices]
        nearest_IN = torch.cdist(place_N2.expand(len(features), -1, -1), seeds_IK2).argmin(-1)
        return cluster_means(features, nearest_IN, grid, top_k)


class ColourClusters(nn.Module):
    """The method's own clustering on the patches' mean colours.

    Set `colours` (I,N,3), in [0, 1], to those of the images before each call.
    """

    def __init__(self):
        super().__init__()
        self.cluster = AdaptiveTokenAggregation(relation_weight=0.0)
        self.colours = None

    def forward(self, features, attention, alpha, beta, grid, top_k) -> AggregationOutput:
        # Scaled within an image; clusters are compared by direction, and the constant keeps dark and light apart.
        colours_IN3 = self.colours - self.colours.mean(1, keepdim=True)
        colours_IN3 = colours_IN3 / colours_IN3.std((1, 2), keepdim=True).clamp_min(1e-6)
        colours_IN4 = torch.cat([colours_IN3, torch.ones_like(colours_IN3[..., :1])], dim=-1)
        found = self.cluster(colours_IN4, None, alpha, beta, grid, top_k)
        means = cluster_means(features, found.assignment.flatten(1), grid, top_k)
        return found._replace(tokens=means.tokens)


MODULES = {GRID: GridCells, RANDOM: RandomClusters, COLOUR: ColourClusters}


def separation(assignment_SN: np.ndarray, scenes: list[world.Scene]) -> float:
    """Adjusted mutual information of groups of patches with what the patches show, mean over scenes; 0 is chance."""
    shown_SN = [[" ".join(words) for words in scene.patch_words()] for scene in scenes]
    return float(np.mean([adjusted_mutual_info_score(*pair) for pair in zip(shown_SN, assignment_SN, strict=True)]))


def cluster_means(features: Tensor, cluster_IN: Tensor, grid: tuple[int, int], tokens: int) -> AggregationOutput:
    """The mean feature and the geometry of each cluster; scores are shares of patches."""
    groups = Groups.of(cluster_IN, tokens)
    tokens_IKD = groups.means(features.float()).to(features.dtype)
    share_IK = groups.count_IK / cluster_IN.shape[1]
    mask_IK, assignment_IHW = groups.count_IK > 0, cluster_IN.unflatten(1, grid)
    return AggregationOutput(tokens_IKD, mask_IK, assignment_IHW, share_IK, geometry(groups, grid))
