"""Adaptive token aggregation (AdaTA, Eq. 4-7): a patch grid becomes a few semantic tokens.

Pooling at the stride of the chosen granularity, relation-aware k-means on the pooled cells and then on the patches, a
quality filter, and the mean of the patches of each cluster. No parameters, no host synchronisation, no loop over
images, no random numbers; the result for an image does not depend on the other images of the batch. Needs torch alone.

Shapes by suffix: I images, N patches of the H x W grid, M pooled cells, X cells or patches, C candidate seeds,
K clusters or token slots, D feature width, S width of the folded features, P width of the clustered points.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CANDIDATES = 64  # cells that may seed a cluster
FOLDED_WIDTH = 128  # of the features that are clustered; tokens are means of the whole ones
ROUNDING = 1e-6  # values that differ by less count as equal


class AggregationOutput(NamedTuple):
    """What the aggregation returns. The slots are ordered by score, unused ones last.

    tokens: (I, K, D) in the dtype of the features, zero in unused slots.
    mask: (I, K) bool, False in unused slots; `kept_tokens` says how many are used.
    assignment: (I, H, W) long, the slot a patch belongs to; every patch has one.
    scores: (I, K) fp32, 0 in unused slots.
    geometry: (I, K, 5) fp32, 0 in unused slots: row and column of the centroid in [-1, 1], standard deviation of rows
    and of columns relative to the image side, logarithm of the share of patches.
    """

    tokens: Tensor
    mask: Tensor
    assignment: Tensor
    scores: Tensor
    geometry: Tensor


def kept_tokens(grid: tuple[int, int], alpha: int, beta: int, top_k: int) -> int:
    """Number of used slots: of the level and the grid alone, whatever the image shows."""
    cells = -(-grid[0] // alpha) * -(-grid[1] // alpha)
    return min(top_k, beta, cells)


def pool_features(features: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """Eq. 4: the mean over stride x stride cells, smaller ones at the border.

    features (I, N, D) of an H x W grid, any float dtype -> (I, M, D) fp32, M = ceil(H / stride) * ceil(W / stride).
    """
    features_IND = features.float()
    if stride == 1:
        return features_IND
    grid_IDHW = features_IND.mT.unflatten(2, grid)  # (I,N,D) -> (I,D,H,W)
    return F.avg_pool2d(grid_IDHW, stride, ceil_mode=True).flatten(2).mT  # -> (I,M,D)


def fold(features_IND: Tensor) -> Tensor:
    """Narrows the features to FOLDED_WIDTH, adding blocks of columns with alternating signs: (I,N,<=FOLDED_WIDTH).

    Inner products stay about what they were, and each round of k-means costs a fraction.
    """
    width = features_IND.shape[-1]
    if width <= FOLDED_WIDTH:
        return features_IND
    if width % FOLDED_WIDTH:
        features_IND = F.pad(features_IND, (0, -width % FOLDED_WIDTH))
    blocks_INBS = features_IND.unflatten(-1, (-1, FOLDED_WIDTH))  # (I,N,D) -> (I,N,blocks,FOLDED_WIDTH)
    return blocks_INBS[..., ::2, :].sum(-2) - blocks_INBS[..., 1::2, :].sum(-2)


class AdaptiveTokenAggregation(nn.Module):
    """Aggregates patch features into semantic tokens.

    relation_weight: lambda_f of Eq. 5, the weight of the attention profiles in the distance.
    iterations: rounds of k-means on the pooled cells; refinement_iterations: rounds on the patches that follow. Both
    are fixed, so that nothing waits for a check.
    score_weights: (eta1, eta2, eta3) of Eq. 6 for size, coherence and dispersion.
    """

    def __init__(
        self,
        relation_weight: float = 3.0,
        iterations: int = 2,
        refinement_iterations: int = 3,
        score_weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ):
        super().__init__()
        self.relation_weight = relation_weight
        self.iterations = iterations
        self.refinement_iterations = refinement_iterations
        self.score_weights = tuple(score_weights)

    def forward(
        self,
        features: Tensor,
        attention: Tensor | None,
        alpha: int,
        beta: int,
        grid: tuple[int, int],
        top_k: int,
    ) -> AggregationOutput:
        """Pool, cluster, filter, aggregate.

        features: (I, N, D) patch features in row-major order of the grid, any float dtype.
        attention: (I, N, N), or summed over groups of columns (I, N, C), non-negative; rows are rescaled to sum to 1.
        alpha, beta, top_k: stride, clusters, token slots.
        Gradients reach the features through the token means; the assignment is discrete.
        """
        kept, clusters = kept_tokens(grid, alpha, beta, top_k), kept_tokens(grid, alpha, beta, beta)
        with torch.autocast(features.device.type, enabled=False) if features.device.type != "meta" else nullcontext():
            features_IND = features.float()
            with torch.no_grad():
                folded_INS = fold(features_IND)
                points_INP = self._points(folded_INS, attention, grid, 1)
                cells_IMP = points_INP if alpha == 1 else self._points(folded_INS, attention, grid, alpha)
                groups, centers_IKP = self._cluster(cells_IMP, points_INP, clusters)
                scores_IK = self._score(groups, points_INP, centers_IKP, grid)
                scores_IK, chosen_IK = (part[:, :kept] for part in scores_IK.sort(descending=True, stable=True))
                chosen_IKP = centers_IKP.gather(1, chosen_IK[..., None].expand(-1, -1, centers_IKP.shape[-1]))
                gain_INK = gains(points_INP, chosen_IKP)
                slot_IN = fill_empty_clusters(first_of_best(gain_INK), gain_INK)
                groups = Groups.of(slot_IN, kept)
            tokens_IKD = groups.means(features_IND).to(features.dtype)
        unused = top_k - kept
        return AggregationOutput(
            F.pad(tokens_IKD, (0, 0, 0, unused)),
            (torch.arange(top_k, device=features.device) < kept).repeat(len(features), 1),
            slot_IN.unflatten(1, grid),
            F.pad(scores_IK, (0, unused)),
            F.pad(geometry(groups, grid), (0, 0, 0, unused)),
        )

    def _points(self, features_INS: Tensor, attention: Tensor | None, grid: tuple[int, int], stride: int) -> Tensor:
        """What is clustered (I,X,P): [a, sqrt(lambda_f) sqrt(A)], both parts at unit length, of pooled cells."""
        unit_IXS = F.normalize(pool_features(features_INS, grid, stride), dim=-1)
        if attention is None or self.relation_weight == 0:
            return unit_IXS
        profile_IXC = F.normalize(pool_features(attention, grid, stride).sqrt(), dim=-1)
        return torch.cat([unit_IXS, self.relation_weight**0.5 * profile_IXC], dim=-1)

    def _cluster(self, cells_IMP: Tensor, points_INP: Tensor, clusters: int) -> tuple["Groups", Tensor]:
        """Eq. 5: k-means, first on the cells, then on the patches. Returns the clusters and their means (I,K,P)."""
        centers_IKP = seed_centers(cells_IMP, clusters)
        for points_IXP in [cells_IMP] * self.iterations + [points_INP] * self.refinement_iterations:
            groups = Groups.of(first_of_best(gains(points_IXP, centers_IKP)), clusters)
            centers_IKP = torch.where(groups.count_IK[..., None] > 0, groups.means(points_IXP), centers_IKP)
        if self.refinement_iterations == 0:
            groups = Groups.of(first_of_best(gains(points_INP, centers_IKP)), clusters)
        return groups, centers_IKP

    def _score(self, groups: "Groups", points_INP: Tensor, centers_IKP: Tensor, grid: tuple[int, int]) -> Tensor:
        """Eq. 6 for each cluster (I,K). Rounded, so that equal clusters tie on any machine."""
        terms_IK = quality_terms(groups, points_INP, centers_IKP, grid)
        size, coherence, dispersion = (eta * term for eta, term in zip(self.score_weights, terms_IK, strict=True))
        return (size + coherence - dispersion).round(decimals=5)


def quality_terms(
    groups: "Groups", points_INP: Tensor, centers_IKP: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of Eq. 6 (I,K), each in [0, 1].

    size: the share of patches over an even share, at most 1; coherence: the part of the members' variance about the
    image's mean that their own centre explains; dispersion: 0 for a disc, towards 1 the more scattered the patches are
    for their number.
    """
    patches, clusters = points_INP.shape[1], centers_IKP.shape[1]
    size_IK = (groups.count_IK * (clusters / patches)).clamp(max=1)
    square_I1 = points_INP.square().sum(-1).mean(1, keepdim=True)
    within_IK = (square_I1 - centers_IKP.square().sum(-1)).clamp_min(0)
    between_IK = (centers_IKP - points_INP.mean(1, keepdim=True)).square().sum(-1)
    coherence_IK = between_IK / (between_IK + within_IK).clamp_min(1e-6) * (groups.count_IK > 0)
    row_IK, column_IK, row_variance_IK, column_variance_IK = places(groups, grid)
    disc_IK = groups.count_IK / (2 * torch.pi)  # the variance of a disc of as many patches, of which each has 1/6
    dispersion_IK = 1 - disc_IK / (row_variance_IK + column_variance_IK + 1 / 6)
    return size_IK, coherence_IK, dispersion_IK.clamp(0, 1)


class Groups(NamedTuple):
    """Rows sorted by image and cluster: their means are deterministic and read every row once.

    order: (I * N) the rows of all images by group.
    start: (I * K + 1) where each group begins in it.
    count_IK: (I, K) members.
    """

    order: Tensor
    start: Tensor
    count_IK: Tensor

    @classmethod
    def of(cls, cluster_IN: Tensor, clusters: int) -> "Groups":
        """From the cluster of each row."""
        images = len(cluster_IN)
        first_I1 = clusters * torch.arange(images, device=cluster_IN.device)[:, None]
        ordered = (first_I1 + cluster_IN).flatten().sort(stable=True)
        start = torch.searchsorted(ordered.values, torch.arange(clusters * images + 1, device=cluster_IN.device))
        return cls(ordered.indices, start, start.diff().unflatten(0, (images, clusters)))

    def means(self, rows_IND: Tensor) -> Tensor:
        """Eq. 7: mean of the rows of each group, (I,K,D); 0 for an empty one."""
        sums = F.embedding_bag(self.order, rows_IND.flatten(0, 1), self.start, mode="sum")
        return sums[:-1].unflatten(0, self.count_IK.shape) / self.count_IK.clamp_min(1)[..., None]


def gains(points_IXP: Tensor, centers_IKP: Tensor) -> Tensor:
    """Minus half of the squared distance of each point to each centre (I,X,K), up to a constant of the point."""
    return points_IXP @ centers_IKP.mT - centers_IKP.square().sum(-1)[:, None] / 2


def first_of_best(values: Tensor) -> Tensor:
    """Index of the first value that is the largest up to rounding (last dimension): the same on any machine."""
    return (values >= values.amax(-1, keepdim=True) - ROUNDING).byte().argmax(-1)


def spread_candidates(cells: int, candidates: int, device: torch.device) -> Tensor:
    """(C,) cells, one in each of C equal stretches, at golden-ratio offsets so that they do not align in columns."""
    rank_C = torch.arange(min(cells, candidates), device=device)
    return ((rank_C + rank_C * 0.6180339887 % 1) * (cells / len(rank_C))).long()


def seed_centers(cells_IMP: Tensor, clusters: int) -> Tensor:
    """Greedy seeds (I,K,P): each is the candidate that most lowers the distance of all cells to their nearest seed."""
    image_I = torch.arange(len(cells_IMP), device=cells_IMP.device)
    candidate_C = spread_candidates(cells_IMP.shape[1], max(CANDIDATES, clusters), cells_IMP.device)
    similar_ICM = cells_IMP[:, candidate_C] @ cells_IMP.mT
    nearest_IM = torch.full_like(similar_ICM[:, 0], -torch.inf)
    seeds = []
    for _ in range(clusters):
        mean_IC = torch.maximum(similar_ICM, nearest_IM[:, None]).mean(-1)
        seeds.append(first_of_best(mean_IC))
        nearest_IM = torch.maximum(nearest_IM, similar_ICM[image_I, seeds[-1]])
    return cells_IMP[image_I[:, None], candidate_C[torch.stack(seeds, dim=-1)]]


def fill_empty_clusters(cluster_IN: Tensor, gain_INK: Tensor) -> Tensor:
    """The j-th empty cluster takes the patch that is j-th farthest from its centre; no cluster gives its nearest one.

    Where patches are at least as many as clusters, none stays empty, also if all patches are equal.
    """
    patches, clusters = gain_INK.shape[1:]
    gain_IN = gain_INK.gather(2, cluster_IN[..., None])[..., 0]
    rank_IN = (gain_IN / ROUNDING).round().argsort(dim=-1, stable=True).argsort(dim=-1)  # 0 for the farthest
    slot_K = torch.arange(clusters, device=cluster_IN.device)
    nearest_IK = torch.where(cluster_IN[..., None] == slot_K, rank_IN[..., None], -1).amax(1)
    stays_IN = rank_IN == nearest_IK.gather(1, cluster_IN)
    farthest_IK = (rank_IN + patches * stays_IN).topk(clusters, largest=False).indices
    empty_IK = nearest_IK < 0
    taken_IK = farthest_IK.gather(1, (empty_IK.cumsum(-1) - 1).clamp_min(0))
    target_IK = torch.where(empty_IK, taken_IK, patches)  # clusters that are not empty: past the end
    return F.pad(cluster_IN, (0, 1)).scatter(1, target_IK, slot_K.expand_as(target_IK))[:, :patches]


def places(groups: Groups, grid: tuple[int, int]) -> Tensor:
    """Mean row and column of each cluster and their variances, in patches; four tensors (I,K)."""
    index_N = torch.arange(grid[0] * grid[1], device=groups.count_IK.device)
    place_N2 = torch.stack([index_N // grid[1], index_N % grid[1]], dim=-1).float()
    moments_N4 = torch.cat([place_N2, place_N2.square()], dim=-1)
    means_IK4 = groups.means(moments_N4.expand(len(groups.count_IK), -1, -1))
    mean_IK2, square_IK2 = means_IK4.chunk(2, dim=-1)
    return torch.cat([mean_IK2, (square_IK2 - mean_IK2.square()).clamp_min(0)], dim=-1).unbind(-1)


def geometry(groups: Groups, grid: tuple[int, int]) -> Tensor:
    """Place, spread and size of each cluster (I,K,5), as `AggregationOutput` says."""
    row_IK, column_IK, row_variance_IK, column_variance_IK = places(groups, grid)
    share_IK = groups.count_IK / (grid[0] * grid[1])
    return torch.stack(
        [
            (2 * row_IK + 1) / grid[0] - 1,
            (2 * column_IK + 1) / grid[1] - 1,
            row_variance_IK.sqrt() / grid[0],
            column_variance_IK.sqrt() / grid[1],
            share_IK.log(),
        ],
        dim=-1,
    )
