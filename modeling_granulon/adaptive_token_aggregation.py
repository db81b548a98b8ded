"""Adaptive token aggregation (AdaTA, Eq. 4-7): a patch grid becomes a few semantic tokens.

Pooling at the stride of the chosen granularity, relation-aware k-means, a quality filter, and the mean of the original
patches of each cluster that stays. No parameters, no host synchronisation, no loop over images, no random numbers; the
result for an image does not depend on the other images of the batch. Needs torch alone.

Shapes by suffix: I images, N patches of the H x W grid, M pooled cells, C candidate seeds, K clusters or token slots,
D feature width.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CANDIDATES = 64  # cells that may seed a cluster
SKETCH_WIDTH = 128  # width of the folded features on which seeds are chosen
SAME_POINT = 1e-5  # cells whose cosine distance is below this count as one point
ROUNDING = 1e-6  # distances that differ by less count as equal
GOLDEN_RATIO = 40503  # times 2 ** -16


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
    """Eq. 6: s_j = eta1 size + eta2 coherence - eta3 dispersion, each part in [0, 1].

    size: share of the image's patches; coherence: mean cosine of the members to their centre; dispersion: mean squared
    distance of the member patches to their centroid, relative to the largest that the grid allows.
    """
    return weights[0] * size + weights[1] * coherence - weights[2] * dispersion


class AdaptiveTokenAggregation(nn.Module):
    """Aggregates patch features into semantic tokens.

    relation_weight: lambda_f of Eq. 5, the weight of the attention profiles in the distance.
    iterations: rounds of k-means, the assignment to the seeds included; fixed, so that nothing waits for a check.
    score_weights: (eta1, eta2, eta3) of Eq. 6 for size, coherence and dispersion.
    max_clusters: where beta and top_k are tensors, the shapes hold this many; larger values count as this.
    """

    def __init__(
        self,
        relation_weight: float = 0.1,
        iterations: int = 2,
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
        slots = self.max_clusters if isinstance(top_k, Tensor) else top_k
        clusters = max(self.max_clusters if isinstance(beta, Tensor) else beta, slots)
        images, device = len(features), features.device
        image_I1 = torch.arange(images, device=device)[:, None]
        index_K, top_k = torch.arange(clusters, device=device), as_column(top_k)
        with torch.autocast(device.type, enabled=False) if device.type != "meta" else nullcontext():
            features_IND = features.float()
            with torch.no_grad():
                cell_IN, exists_IM, pooled_IMD, attention_IMM = pool(features_IND, attention, alpha, grid)
                allowed_IK = (index_K < as_column(beta)).expand(images, clusters)
                cluster_IM, cosine_IM = self._cluster(pooled_IMD, attention_IMM, exists_IM, allowed_IK)
                cluster_IN, cosine_IN = cluster_IM.gather(1, cell_IN), cosine_IM.gather(1, cell_IN)
                groups = Groups.of(cluster_IN, clusters)
                ranking = self._score(groups, cosine_IN, grid).sort(dim=-1, descending=True, stable=True)
                slot_IN = ranking.indices.argsort(dim=-1).gather(1, cluster_IN)  # the rank of the patch's cluster
                slot_IN = slot_IN.masked_fill(slot_IN >= top_k, -1)
                scores_IK, chosen_IK = ranking.values[:, :slots], ranking.indices[:, :slots]
                mask_IK = scores_IK.isfinite() & (index_K[:slots] < top_k)
            tokens_IKD = groups.means(features_IND)[image_I1, chosen_IK] * mask_IK[..., None]
        scores_IK = scores_IK.masked_fill(~mask_IK, 0)
        return AggregationOutput(tokens_IKD.to(features.dtype), mask_IK, slot_IN.unflatten(1, grid), scores_IK)

    def _cluster(
        self, pooled_IMD: Tensor, attention_IMM: Tensor | None, exists_IM: Tensor, allowed_IK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Eq. 5: k-means on [a, sqrt(lambda_f) A] with a the pooled feature at unit length.

        Returns the cluster of each cell (I,M) and the cosine to its centre (I,M).
        """
        scale_IM1 = 1 / torch.linalg.vector_norm(pooled_IMD, dim=-1, keepdim=True).clamp_min(1e-12)
        cluster_IM, cosine_IM = assign_to_seeds(pooled_IMD, exists_IM, allowed_IK)
        distance_IM = 1 - cosine_IM
        for _ in range(self.iterations - 1):
            cluster_IM = fill_empty_clusters(cluster_IM, distance_IM, exists_IM, allowed_IK)
            groups = Groups.of(cluster_IM.masked_fill(~exists_IM, -1), allowed_IK.shape[1])
            centers_IKD = groups.means(pooled_IMD, scale_IM1)
            square_IK = centers_IKD.square().sum(-1)
            product_IMK = pooled_IMD @ centers_IKD.mT * scale_IM1
            gain_IMK = product_IMK - square_IK[:, None] / 2  # up to a constant, minus half of the squared distance
            if attention_IMM is not None:
                profiles_IKM = groups.means(attention_IMM)
                relation_IMK = attention_IMM @ profiles_IKM.mT - profiles_IKM.square().sum(-1)[:, None] / 2
                gain_IMK = gain_IMK + self.relation_weight * relation_IMK
            gain_IMK = gain_IMK.masked_fill(groups.count_IK[:, None] == 0, -torch.inf)
            cluster_IM = first_of_best(gain_IMK, ROUNDING)
            product_IM = product_IMK.gather(2, cluster_IM[..., None])[..., 0]
            square_IM = square_IK.gather(1, cluster_IM)
            distance_IM = 0.5 + square_IM / 2 - product_IM
            cosine_IM = product_IM * square_IM.clamp_min(1e-12).rsqrt()
        return cluster_IM, cosine_IM

    def _score(self, groups: "Groups", cosine_IN: Tensor, grid: tuple[int, int]) -> Tensor:
        """Eq. 6 for each cluster (I,K), -inf for empty ones. Rounded, so that equal clusters tie on any machine."""
        row_N, column_N = grid_coordinates(grid, cosine_IN.device)
        place_N3 = torch.stack([row_N, column_N, row_N**2 + column_N**2], dim=-1).float()
        means_IK4 = groups.means(torch.cat([cosine_IN[..., None], place_N3.expand(len(cosine_IN), -1, -1)], dim=-1))
        coherence_IK, row_IK, column_IK, square_IK = means_IK4.unbind(-1)
        widest = max((grid[0] - 1) ** 2 + (grid[1] - 1) ** 2, 1) / 4  # half of the patches in each of two far corners
        dispersion_IK = (square_IK - row_IK**2 - column_IK**2) / widest
        size_IK = groups.count_IK / cosine_IN.shape[1]
        scores_IK = quality_scores(size_IK, coherence_IK.clamp(0, 1), dispersion_IK.clamp(0, 1), self.score_weights)
        return scores_IK.round(decimals=5).masked_fill(groups.count_IK == 0, -torch.inf)


class Groups(NamedTuple):
    """Rows sorted by image and cluster: their means are deterministic and read every row once.

    order: (I * N) the rows of all images by group, those without one last.
    start: (I * K + 1) where each group begins in it.
    count_IK: (I, K) members.
    """

    order: Tensor
    start: Tensor
    count_IK: Tensor

    @classmethod
    def of(cls, cluster_IN: Tensor, clusters: int) -> "Groups":
        """From the cluster of each row, -1 for none."""
        images = len(cluster_IN)
        first_I1 = clusters * torch.arange(images, device=cluster_IN.device)[:, None]
        group_IN = torch.where(cluster_IN < 0, clusters * images, first_I1 + cluster_IN)
        ordered = group_IN.flatten().sort(stable=True)
        start = torch.searchsorted(ordered.values, torch.arange(clusters * images + 1, device=cluster_IN.device))
        return cls(ordered.indices, start, start.diff().unflatten(0, (images, clusters)))

    def means(self, rows_IND: Tensor, weights: Tensor | None = None) -> Tensor:
        """Eq. 7: mean of the (weighted) rows of each group, (I,K,D); 0 for an empty one."""
        weights = None if weights is None else weights.flatten()[self.order]
        sums = F.embedding_bag(self.order, rows_IND.flatten(0, 1), self.start, mode="sum", per_sample_weights=weights)
        return sums[:-1].unflatten(0, self.count_IK.shape) / self.count_IK.clamp_min(1)[..., None]


def as_column(value: int | Tensor) -> int | Tensor:
    """(I,) -> (I,1), so that it broadcasts over what each image holds."""
    return value[:, None] if isinstance(value, Tensor) else value


def first_of_best(values: Tensor, tolerance: float | Tensor) -> Tensor:
    """Index of the first value that is the largest up to a tolerance (last dimension): the same on any machine."""
    return (values >= values.amax(-1, keepdim=True) - tolerance).byte().argmax(-1)


def grid_coordinates(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, (N,) long each."""
    index_N = torch.arange(grid[0] * grid[1], device=device)
    return index_N // grid[1], index_N % grid[1]


def pool(
    features_IND: Tensor, attention: Tensor | None, alpha: int | Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Eq. 4. Returns the cell of each patch (I,N), which cells exist (I,M), pooled features and pooled attention.

    A tensor alpha keeps room for M = N cells, of which an image fills the first ones.
    """
    stride = as_column(alpha)
    row_N, column_N = grid_coordinates(grid, features_IND.device)
    cell_IN = (row_N // stride * -(-grid[1] // stride) + column_N // stride).expand(features_IND.shape[:2])
    if isinstance(alpha, Tensor):
        groups = Groups.of(cell_IN, cell_IN.shape[1])
        pooled_IMD = groups.means(features_IND)
        if attention is not None:
            attention = groups.means(groups.means(attention.float()).mT).mT
        return cell_IN, groups.count_IK > 0, pooled_IMD, attention
    pooled_IMD = pool_features(features_IND, grid, alpha)
    if attention is not None and attention.shape[1] != pooled_IMD.shape[1]:
        attention = pool_attention(attention, grid, alpha)
    attention = None if attention is None else attention.float()
    return cell_IN, torch.ones_like(pooled_IMD[..., 0], dtype=torch.bool), pooled_IMD, attention


def sketch(features_IMD: Tensor) -> Tensor:
    """Folds the width to some SKETCH_WIDTH, adding blocks with alternating signs: distances good enough for seeds."""
    width = features_IMD.shape[-1]
    blocks = next(n for n in range(max(1, width // SKETCH_WIDTH), 0, -1) if width % n == 0)
    blocks_IMnS = features_IMD.unflatten(-1, (blocks, -1))  # (I,M,D) -> (I,M,blocks,D/blocks)
    return blocks_IMnS[..., ::2, :].sum(-2) - blocks_IMnS[..., 1::2, :].sum(-2)


def spread_candidates(count_I1: Tensor, cells: int) -> Tensor:
    """(I,C) cells, one in each of C equal stretches, at golden-ratio offsets so that they do not align in columns."""
    rank_C = torch.arange(min(cells, CANDIDATES), device=count_I1.device)
    position_C = (rank_C << 16) + rank_C * GOLDEN_RATIO % 65536
    return position_C * count_I1.clamp_min(len(rank_C)) // (len(rank_C) << 16)


def assign_to_seeds(pooled_IMD: Tensor, exists_IM: Tensor, allowed_IK: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy seeds: each is the candidate that most lowers the total distance of all cells to their nearest seed.

    A place without a cell has a zero row, which is never better than the best cell. The attention joins in the rounds
    that follow. Returns each cell's nearest seed (I,M) and the cosine to it (I,M).
    """
    image_I = torch.arange(len(pooled_IMD), device=pooled_IMD.device)
    count_I1 = exists_IM.sum(1, keepdim=True)
    candidate_IC = spread_candidates(count_I1, pooled_IMD.shape[1])
    sketch_IMS = F.normalize(sketch(pooled_IMD), dim=-1)
    cosine_ICM = sketch_IMS[image_I[:, None], candidate_IC] @ sketch_IMS.mT
    nearest_IM = torch.full_like(cosine_ICM[:, 0], -1)
    seeds = []
    for _ in range(allowed_IK.shape[1]):
        total_IC = torch.maximum(cosine_ICM, nearest_IM[:, None]).sum(-1)
        seeds.append(cosine_ICM[image_I, first_of_best(total_IC, ROUNDING * count_I1)])
        nearest_IM = torch.maximum(nearest_IM, seeds[-1])
    cosine_IMK = torch.stack(seeds, dim=-1).masked_fill(~allowed_IK[:, None], -torch.inf)
    return first_of_best(cosine_IMK, ROUNDING), cosine_IMK.amax(-1)


def fill_empty_clusters(cluster_IM: Tensor, distance_IM: Tensor, exists_IM: Tensor, allowed_IK: Tensor) -> Tensor:
    """The j-th empty cluster takes the cell that is j-th farthest from its centre, unless it lies in the centre."""
    cells, clusters = cluster_IM.shape[1], allowed_IK.shape[1]
    slot_K = torch.arange(clusters, device=cluster_IM.device)
    member_IKM = (cluster_IM[:, None] == slot_K[:, None]) & exists_IM[:, None]
    empty_IK = allowed_IK & ~member_IKM.any(-1)
    farthest = (distance_IM * exists_IM).topk(min(clusters, cells), dim=-1)
    rank_IK = (empty_IK.cumsum(-1) - 1).clamp(0, min(clusters, cells) - 1)
    moves_IK = empty_IK & (farthest.values.gather(1, rank_IK) > SAME_POINT)
    target_IK = torch.where(moves_IK, farthest.indices.gather(1, rank_IK), cells)  # the rest: past the end
    return F.pad(cluster_IM, (0, 1)).scatter(1, target_IK, slot_K.expand_as(target_IK))[:, :cells]
