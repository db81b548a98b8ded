"""Other methods of token reduction, re-implemented compactly from their papers and code.

The batched ones are batched and the looping ones loop, as published. Each takes features (I, N, D) and returns its
tokens and the token that each patch went to, (I, K, D) and (I, N), or lists where images are looped over.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def authors_kmeans(features: Tensor, clusters: int) -> tuple[list[Tensor], list[Tensor]]:
    """k-means on the rows of the cosine matrix, image by image, until the centres converge."""
    tokens, labels = [], []
    for patches_ND in features:
        unit_ND = F.normalize(patches_ND, dim=-1)
        rows_NN = unit_ND @ unit_ND.mT
        order = torch.randperm(len(rows_NN), generator=torch.Generator().manual_seed(42))
        centers_KN = rows_NN[order[:clusters].to(rows_NN.device)]
        for _ in range(100):
            label_N = torch.cdist(rows_NN, centers_KN).argmin(1)
            member_NK = torch.zeros(len(rows_NN), clusters, device=rows_NN.device).scatter_(1, label_N[:, None], 1)
            moved_KN = member_NK.T @ rows_NN / member_NK.sum(0).clamp_min(1)[:, None]
            if torch.allclose(centers_KN, moved_KN, atol=1e-6):
                break
            centers_KN = moved_KN
        chosen = [patches_ND[label_N == k] for k in range(clusters)]
        tokens.append(torch.stack([rows.mean(0) if len(rows) else rows.sum(0) for rows in chosen]))
        labels.append(label_N)
    return tokens, labels


def fast_pytorch_kmeans_round(patches_ND: Tensor, centers_KD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The part of fast_pytorch_kmeans that can be compiled: new centres, labels and the squared shift."""
    similar_NK = 2 * patches_ND @ centers_KD.T - centers_KD.square().sum(1)
    label_N = (similar_NK - patches_ND.square().sum(1, keepdim=True)).max(-1).indices
    member_KN = (label_N[None] == torch.arange(len(centers_KD), device=label_N.device)[:, None]).to(patches_ND.dtype)
    moved_KD = (member_KN @ patches_ND / member_KN.sum(-1, keepdim=True)).nan_to_num()
    return moved_KD, label_N, (moved_KD - centers_KD).square().sum()


def fast_pytorch_kmeans(
    features: Tensor, clusters: int, one_round=fast_pytorch_kmeans_round
) -> tuple[list[Tensor], list[Tensor]]:
    """k-means on the features, image by image, random seeds, until the squared shift of the centres is below 1e-4."""
    tokens, labels = [], []
    for patches_ND in features:
        order = torch.randperm(len(patches_ND), generator=torch.Generator().manual_seed(42))
        centers_KD = patches_ND[order[:clusters].to(patches_ND.device)]
        for _ in range(100):
            centers_KD, label_N, shift = one_round(patches_ND, centers_KD)
            if shift <= 1e-4:
                break
        tokens.append(centers_KD)
        labels.append(label_N)
    return tokens, labels


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


def dpc_knn(features: Tensor, clusters: int, neighbours: int = 5) -> tuple[Tensor, Tensor]:
    """Density peaks: centres are dense and far from denser ones; the others join the nearest centre."""
    images, count, width = features.shape
    distance_INN = torch.cdist(features, features) / width**0.5
    density_IN = distance_INN.topk(neighbours, largest=False).values.square().mean(-1).neg().exp()
    denser_INN = density_IN[:, None] > density_IN[:, :, None]
    farthest_I11 = distance_INN.amax((1, 2), keepdim=True)
    gap_IN = torch.where(denser_INN, distance_INN, farthest_I11).amin(-1)
    center_IK = (gap_IN * density_IN).topk(clusters).indices
    label_IN = distance_INN.gather(1, center_IK[..., None].expand(-1, -1, count)).argmin(1)
    flat = (label_IN + clusters * torch.arange(images, device=features.device)[:, None]).flatten()
    sums = features.new_zeros(images * clusters, width).index_add_(0, flat, features.flatten(0, 1))
    members = torch.zeros(images * clusters, device=features.device).index_add_(0, flat, torch.ones_like(flat).float())
    return (sums / members.clamp_min(1)[:, None]).unflatten(0, (images, clusters)), label_IN


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


def grid_cells(features: Tensor, kept: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Average pooling: a grid of cells as square as `kept` allows."""
    rows = next(rows for rows in range(int(kept**0.5), 0, -1) if kept % rows == 0)
    row_N, column_N = torch.cartesian_prod(*map(torch.arange, grid)).to(features.device).unbind(-1)
    label_N = row_N * rows // grid[0] * (kept // rows) + column_N * (kept // rows) // grid[1]
    member_KN = (label_N == torch.arange(kept, device=features.device)[:, None]).to(features.dtype)
    return member_KN / member_KN.sum(-1, keepdim=True) @ features, label_N.expand(features.shape[:2])
