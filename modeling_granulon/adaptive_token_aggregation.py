"""Adaptive token aggregation (AdaTA, Eq. 4-7): a patch grid becomes a few semantic tokens.

Pooling at the stride of the chosen granularity, relation-aware k-means, a quality filter, and the mean of the original
patches of each cluster that stays. No parameters, no host synchronisation, no loop over images, no random numbers; the
result for an image does not depend on the other images of the batch. Needs torch alone.

Shapes by suffix: I images, N patches of the H x W grid, M pooled cells, K clusters or token slots, D feature width,
C width of a point in cluster space.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Points closer than this (squared distance, features of unit length) count as the same point.
SAME_POINT = 1e-10


class AggregationOutput(NamedTuple):
    """What the aggregation returns. The slots are ordered by score, unused ones last.

    tokens: (I, K, D) in the dtype of the features, zero in unused slots.
    mask: (I, K) bool, False in unused slots.
    assignment: (I, H, W) long, the slot a patch belongs to, -1 where its cluster was not kept.
    scores: (I, K) fp32, 0 in unused slots.
    """

    tokens: Tensor
    mask: Tensor
    assignment: Tensor
    scores: Tensor


def pool_features(features: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """Eq. 4 for features: the mean over stride x stride cells, smaller ones at the border.

    features (I, N, D) of an H x W grid, any float dtype -> (I, M, D) fp32, M = ceil(H / stride) * ceil(W / stride).
    """
    features_IND = features.float()
    if stride == 1:
        return features_IND
    grid_IDHW = features_IND.mT.unflatten(2, grid)  # (I,N,D) -> (I,D,H,W)
    return F.avg_pool2d(grid_IDHW, stride, ceil_mode=True).flatten(2).mT  # -> (I,M,D)


def pool_attention(attention: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """Eq. 4 for attention: K' A K with the averaging matrix K. (I, N, N), any float dtype -> (I, M, M) fp32."""
    rows_IMN = pool_features(attention, grid, stride)
    return pool_features(rows_IMN.mT, grid, stride).mT


def quality_scores(size: Tensor, coherence: Tensor, dispersion: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """Eq. 7: s_j = eta1 size + eta2 coherence - eta3 dispersion, each part in [0, 1].

    size: share of the image's patches; coherence: mean cosine of the members to their centre; dispersion: mean squared
    distance of the member patches to their centroid, relative to the largest that the grid allows.
    """
    return weights[0] * size + weights[1] * coherence - weights[2] * dispersion


class AdaptiveTokenAggregation(nn.Module):
    """Aggregates patch features into semantic tokens.

    relation_weight: lambda_f of Eq. 5, the weight of the attention profiles in the distance.
    iterations: rounds of k-means after the seeding; a fixed number, so that nothing waits for a convergence check.
    score_weights: (eta1, eta2, eta3) of Eq. 7 for size, coherence and dispersion.
    max_clusters: the largest beta or top_k that a tensor argument may hold, since shapes cannot depend on its values.
    """

    def __init__(
        self,
        relation_weight: float = 0.1,
        iterations: int = 3,
        score_weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        max_clusters: int = 24,
    ):
        super().__init__()
        self.relation_weight = relation_weight
        self.iterations = iterations
        self.score_weights = tuple(score_weights)
        self.max_clusters = max_clusters

    def forward(
        self,
        features: Tensor,
        attention: Tensor | None,
        alpha: int | Tensor,
        beta: int | Tensor,
        grid: tuple[int, int],
        top_k: int | Tensor,
    ) -> AggregationOutput:
        """Pool, cluster, filter, aggregate.

        features: (I, N, D) patch features in row-major order of the grid, any float dtype.
        attention: (I, N, N), rows summing to 1; or, for an int alpha, already pooled to (I, M, M); or None.
        alpha, beta, top_k: stride, clusters, kept tokens; ints (the fast way) or (I,) long tensors (a mixed batch).
        Gradients reach the features through the token means; the assignment is discrete.
        """
        device = features.device
        fp32 = torch.autocast(device.type, enabled=False) if device.type != "meta" else nullcontext()
        with fp32:
            with torch.no_grad():
                cell_IN, features_IMD, attention_IMM, used_IM = self._pool(features, attention, alpha, grid)
                points_IMC = F.normalize(features_IMD, dim=-1)
                if attention_IMM is not None:
                    points_IMC = torch.cat([points_IMC, self.relation_weight**0.5 * attention_IMM], dim=-1)
                slots = max(self._bound(beta), self._bound(top_k))
                cluster_IM, coherence_IK = self._cluster(points_IMC, used_IM, beta, slots, features.shape[-1])
                cluster_IN = cluster_IM.gather(1, cell_IN)
                slot_IN, scores_IK, mask_IK = self._select(cluster_IN, coherence_IK, top_k, grid)
                weights_IKN = one_hot(slot_IN, mask_IK.shape[1])
                weights_IKN = weights_IKN / weights_IKN.sum(-1, keepdim=True).clamp_min(1)
            tokens_IKD = weights_IKN @ features.float()
        return AggregationOutput(tokens_IKD.to(features.dtype), mask_IK, slot_IN.unflatten(1, grid), scores_IK)

    def _bound(self, count: int | Tensor) -> int:
        return self.max_clusters if isinstance(count, Tensor) else count

    def _pool(self, features: Tensor, attention: Tensor | None, alpha: int | Tensor, grid: tuple[int, int]):
        """Eq. 4. Returns the cell of each patch (I,N), pooled features, pooled attention or None, used cells (I,M).

        A tensor alpha keeps M = N: a cell lives at the place of its first patch, the other places are unused.
        """
        rows_N, columns_N = grid_coordinates(grid, features.device)
        if isinstance(alpha, Tensor):
            stride_I1 = alpha[:, None]
            cell_IN = (rows_N - rows_N % stride_I1) * grid[1] + columns_N - columns_N % stride_I1
            used_IM = cell_IN == torch.arange(cell_IN.shape[1], device=features.device)
            features_IMD = mean_by_cell(features.float(), cell_IN)
            if attention is not None:
                attention = mean_by_cell(mean_by_cell(attention.float(), cell_IN).mT, cell_IN).mT
            return cell_IN, features_IMD, attention, used_IM
        cell_N = rows_N // alpha * -(-grid[1] // alpha) + columns_N // alpha
        features_IMD = pool_features(features, grid, alpha)
        if attention is not None and attention.shape[1] != features_IMD.shape[1]:
            attention = pool_attention(attention, grid, alpha)
        attention = None if attention is None else attention.float()
        used_IM = torch.ones(features_IMD.shape[:2], dtype=torch.bool, device=features.device)
        return cell_N.expand(len(features), -1), features_IMD, attention, used_IM

    def _cluster(self, points_IMC: Tensor, used_IM: Tensor, beta: int | Tensor, slots: int, width: int):
        """Eq. 5-6: k-means. Returns the cluster of each cell (I,M) and the clusters' coherence (I,K)."""
        centers_IKC, active_IK = seed_centers(points_IMC, used_IM, beta, slots)
        cluster_IM, distance_IM = assign(points_IMC, centers_IKC, active_IK)
        for _ in range(self.iterations):
            centers_IKC = update_centers(points_IMC, cluster_IM, distance_IM, used_IM, active_IK)
            cluster_IM, distance_IM = assign(points_IMC, centers_IKC, active_IK)
        directions_IKD = F.normalize(centers_IKC[..., :width], dim=-1)
        cosine_IMK = points_IMC[..., :width] @ directions_IKD.mT
        member_IKM = one_hot(cluster_IM, slots) * used_IM[:, None]
        coherence_IK = (member_IKM * cosine_IMK.mT).sum(-1) / member_IKM.sum(-1).clamp_min(1)
        return cluster_IM, coherence_IK.clamp(0, 1)

    def _select(self, cluster_IN: Tensor, coherence_IK: Tensor, top_k: int | Tensor, grid: tuple[int, int]):
        """Eq. 7: keep the best clusters. Returns the slot of each patch (I,N) or -1, scores (I,K), mask (I,K)."""
        member_IKN = one_hot(cluster_IN, coherence_IK.shape[1])
        count_IK = member_IKN.sum(-1)
        place_N2 = torch.stack(grid_coordinates(grid, cluster_IN.device), dim=-1).float()
        centroid_IK2 = member_IKN @ place_N2 / count_IK.clamp_min(1)[..., None]
        square_IK = member_IKN @ place_N2.square().sum(-1) / count_IK.clamp_min(1)
        widest = max((grid[0] - 1) ** 2 + (grid[1] - 1) ** 2, 1) / 4  # half of the patches in each of two far corners
        dispersion_IK = ((square_IK - centroid_IK2.square().sum(-1)) / widest).clamp(0, 1)
        scores_IK = quality_scores(count_IK / cluster_IN.shape[1], coherence_IK, dispersion_IK, self.score_weights)

        ranking = scores_IK.masked_fill(count_IK == 0, -torch.inf).sort(dim=-1, descending=True, stable=True)
        slot_IN = ranking.indices.argsort(dim=-1).gather(1, cluster_IN)  # a cluster's rank is its slot
        if isinstance(top_k, Tensor):
            top_k = top_k[:, None]
        width = self._bound(top_k)
        mask_IK = ranking.values[:, :width].isfinite() & (torch.arange(width, device=slot_IN.device) < top_k)
        scores_IK = ranking.values[:, :width].masked_fill(~mask_IK, 0)
        return slot_IN.masked_fill(slot_IN >= top_k, -1), scores_IK, mask_IK


def grid_coordinates(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, (N,) long each."""
    index_N = torch.arange(grid[0] * grid[1], device=device)
    return index_N // grid[1], index_N % grid[1]


def one_hot(index: Tensor, classes: int) -> Tensor:
    """(I, N) long -> (I, classes, N) fp32; an index below 0 belongs to no class."""
    return (index[:, None] == torch.arange(classes, device=index.device)[:, None]).float()


def mean_by_cell(values: Tensor, cell: Tensor) -> Tensor:
    """Mean of the rows (I, N, D) that share a cell (I, N), at the cell's place; 0 at places that are no cell."""
    count_IN = torch.zeros_like(values[..., 0]).scatter_add_(1, cell, torch.ones_like(values[..., 0]))
    total_IND = torch.zeros_like(values).scatter_add_(1, cell[..., None].expand_as(values), values)
    return total_IND / count_IN.clamp_min(1)[..., None]


def seed_centers(points_IMC: Tensor, used_IM: Tensor, beta: int | Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Farthest-point seeds (I,K,C), the first one the point farthest from the mean, and which are in use (I,K).

    A slot is in use when it is below beta and its point differs from all earlier ones.
    """
    count_I11 = used_IM.sum(1)[:, None, None]
    mean_I1C = (points_IMC * used_IM[..., None]).sum(1, keepdim=True) / count_I11
    distance_IM = squared_distance(points_IMC, mean_I1C)
    centers, active = [], []
    for k in range(slots):
        farthest_I1 = distance_IM.masked_fill(~used_IM, -1).argmax(1, keepdim=True)
        center_I1C = points_IMC.take_along_dim(farthest_I1[..., None], 1)
        active.append(distance_IM.take_along_dim(farthest_I1, 1) > SAME_POINT if k else used_IM[:, :1])
        to_center_IM = squared_distance(points_IMC, center_I1C)
        distance_IM = torch.minimum(distance_IM, to_center_IM) if k else to_center_IM
        centers.append(center_I1C)
    slot_K = torch.arange(slots, device=points_IMC.device)
    below_beta = slot_K < (beta[:, None] if isinstance(beta, Tensor) else beta)
    return torch.cat(centers, 1), torch.cat(active, 1) & below_beta


def squared_distance(points_IMC: Tensor, center_I1C: Tensor) -> Tensor:
    """(I, M), by differences: exactly 0 for equal points."""
    return (points_IMC - center_I1C).square().sum(-1)


def assign(points_IMC: Tensor, centers_IKC: Tensor, active_IK: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest active centre of each point (I,M), the first among equals, and the squared distance to it (I,M)."""
    gain_IMK = torch.baddbmm(-0.5 * centers_IKC.square().sum(-1)[:, None], points_IMC, centers_IKC.mT)
    gain_IM, cluster_IM = gain_IMK.masked_fill(~active_IK[:, None], -torch.inf).max(-1)
    return cluster_IM, (points_IMC.square().sum(-1) - 2 * gain_IM).clamp_min(0)


def update_centers(
    points_IMC: Tensor, cluster_IM: Tensor, distance_IM: Tensor, used_IM: Tensor, active_IK: Tensor
) -> Tensor:
    """Means of the members (I,K,C); the j-th empty cluster moves to the point j-th farthest from its centre."""
    member_IKM = one_hot(cluster_IM, active_IK.shape[1]) * used_IM[:, None]
    count_IK1 = member_IKM.sum(-1, keepdim=True)
    mean_IKC = member_IKM @ points_IMC / count_IK1.clamp_min(1)
    empty_IK1 = (count_IK1 == 0) & active_IK[..., None]
    farthest_IM = distance_IM.masked_fill(~used_IM, -1).argsort(dim=1, descending=True, stable=True)
    rank_IK1 = (empty_IK1.cumsum(1) - 1).clamp(0, points_IMC.shape[1] - 1)
    seed_IKC = points_IMC.take_along_dim(farthest_IM[..., None].take_along_dim(rank_IK1, 1), 1)
    return torch.where(empty_IK1, seed_IKC, mean_IKC)
