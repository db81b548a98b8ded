"""Other methods of token reduction, re-implemented compactly from their papers and code.

The batched ones are batched and the looping ones loop, as published. Each takes features (I, N, D) and returns its
tokens and the token that each patch went to, (I, K, D) and (I, N), or lists where images are looped over.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def authors_kmeans_round(rows_NN: Tensor, centers_KN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The part of the authors' k-means that can be compiled: new centres, labels and whether it has converged."""
    label_N = torch.cdist(rows_NN, centers_KN).argmin(1)
    member_NK = torch.zeros(len(rows_NN), len(centers_KN), device=rows_NN.device).scatter_(1, label_N[:, None], 1)
    moved_KN = member_NK.T @ rows_NN / member_NK.sum(0).clamp_min(1)[:, None]
    return moved_KN, label_N, torch.isclose(centers_KN, moved_KN, atol=1e-6).all()


def authors_kmeans(
    features: Tensor, clusters: int, one_round=authors_kmeans_round
) -> tuple[list[Tensor], list[Tensor]]:
    """k-means on the rows of the cosine matrix, image by image, until the centres converge."""
    tokens, labels = [], []
    for patches_ND in features:
        unit_ND = F.normalize(patches_ND, dim=-1)
        rows_NN = unit_ND @ unit_ND.mT
        order = torch.randperm(len(rows_NN), generator=torch.Generator().manual_seed(42))
        centers_KN = rows_NN[order[:clusters].to(rows_NN.device)]
        for _ in range(100):
            centers_KN, label_N, converged = one_round(rows_NN, centers_KN)
            if converged:
                break
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
