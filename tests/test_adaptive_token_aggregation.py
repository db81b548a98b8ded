"""AdaTA (Eq. 4-7): pooling, relation-aware clustering, quality filter, token means.

The features are drawn: smooth regions of an image plane, a few slow waves and noise in each patch, with neighbours
about as alike as those of a vision transformer. The attention follows regions of its own.
"""

import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_granulon.adaptive_token_aggregation import (
    AdaptiveTokenAggregation,
    pool_attention,
    pool_features,
    spread_candidates,
)

LEVELS = [(1, 24, 20), (2, 12, 10), (4, 6, 5)]
MIXED = tuple(torch.tensor(column) for column in zip(*LEVELS, strict=True))


def draw(images=3, grid=(12, 16), width=48, seed=0, noise=0.5):
    """Features (I, N, D) and attention (I, N, N)."""
    random = torch.Generator().manual_seed(seed)
    place_N2 = torch.cartesian_prod(torch.linspace(0, 1, grid[0]), torch.linspace(0, 1, grid[1])).view(-1, 2)
    features, attention = [], []
    for _ in range(images):
        shown_NR, attended_NR = (
            (-30 * torch.cdist(place_N2, torch.rand(12, 2, generator=random))).softmax(-1) for _ in range(2)
        )
        waves_NW = torch.sin(place_N2 @ torch.randn(2, 8, generator=random) * 4)
        clean_ND = shown_NR @ torch.randn(12, width, generator=random)
        clean_ND = clean_ND + 0.3 * waves_NW @ torch.randn(8, width, generator=random)
        features.append(clean_ND + noise * torch.randn(clean_ND.shape, generator=random))
        attention.append((6 * attended_NR @ attended_NR.mT).softmax(-1))
    return torch.stack(features), torch.stack(attention)


def one_hot(assignment, slots):
    """(I, H, W) -> (I, K, N), in double precision."""
    return (assignment.flatten(1)[:, None] == torch.arange(slots)[:, None]).double()


def deviations(points, assignment, slots):
    """Squared distance of each point (I, N, C) to the mean of each cluster, (I, N, K)."""
    member = one_hot(assignment, slots)
    centers = member @ points.double() / member.sum(-1, keepdim=True).clamp_min(1)
    return torch.cdist(points.double(), centers).square()


def objective(points, assignment, slots):
    """What Eq. 5 minimises, (I,)."""
    nearest = one_hot(assignment, slots).mT * deviations(points, assignment, slots)
    return nearest.sum((1, 2))


def cells_of(grid, stride):
    """Lists of patch indices, cell by cell."""
    index = np.arange(grid[0] * grid[1]).reshape(grid)
    return [
        index[row : row + stride, column : column + stride].ravel()
        for row in range(0, grid[0], stride)
        for column in range(0, grid[1], stride)
    ]


def assert_same(one, other):
    torch.testing.assert_close(one.tokens, other.tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.scores, other.scores, atol=2e-5, rtol=0)
    assert torch.equal(one.mask, other.mask)
    assert torch.equal(one.assignment, other.assignment)


# ---- Eq. 4


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 9])
def test_pooling_is_the_mean_over_cells_with_smaller_ones_at_the_border(stride):
    grid = (7, 9)
    features, attention = draw(2, grid, width=5)
    averaging = np.zeros((63, len(cells_of(grid, stride))))
    for cell, patches in enumerate(cells_of(grid, stride)):
        averaging[patches, cell] = 1 / len(patches)
    np.testing.assert_allclose(pool_features(features, grid, stride), averaging.T @ features.numpy(), atol=1e-6)
    expected = averaging.T @ attention.numpy() @ averaging
    np.testing.assert_allclose(pool_attention(attention, grid, stride), expected, atol=1e-7)


def test_attention_may_come_pooled():
    features, attention = draw(grid=(7, 9))
    aggregate = AdaptiveTokenAggregation(relation_weight=5.0)
    whole = aggregate(features, attention, 2, 6, grid=(7, 9), top_k=5)
    assert_same(whole, aggregate(features, pool_attention(attention, (7, 9), 2), 2, 6, grid=(7, 9), top_k=5))


def test_patches_of_a_cell_stay_together():
    features, attention = draw(1, (7, 9))
    result = AdaptiveTokenAggregation()(features, attention, 3, 5, grid=(7, 9), top_k=4)
    for patches in cells_of((7, 9), 3):
        assert len(result.assignment.flatten()[torch.from_numpy(patches)].unique()) == 1


# ---- Eq. 5


@pytest.mark.parametrize("relation_weight", [0.0, 0.1, 20.0])
def test_each_round_lowers_the_objective(relation_weight):
    features, attention = draw(6, noise=1.0)
    points = torch.cat([F.normalize(features, dim=-1), relation_weight**0.5 * attention], dim=-1)
    values = []
    for iterations in range(2, 12):  # the first round assigns to seeds, which attention does not choose
        result = AdaptiveTokenAggregation(relation_weight, iterations)(features, attention, 1, 10, (12, 16), 10)
        values.append(objective(points, result.assignment, 10))
    steps = torch.stack(values).diff(dim=0)
    assert (steps <= 1e-4).all()
    assert steps.sum() < 0


def test_at_rest_every_cell_is_nearest_to_its_own_centre():
    features, attention = draw(4)
    relation_weight = 20.0
    points = torch.cat([F.normalize(features, dim=-1), relation_weight**0.5 * attention], dim=-1)
    result = AdaptiveTokenAggregation(relation_weight, iterations=40)(features, attention, 1, 8, (12, 16), 8)
    distance = deviations(points, result.assignment, 8)
    own = distance.gather(2, result.assignment.flatten(1)[..., None])[..., 0]
    assert (own <= distance.amin(-1) + 1e-5).all()


def test_attention_takes_part_as_its_weight_says():
    features, attention = draw(4)
    points = torch.cat([F.normalize(features, dim=-1), 20**0.5 * attention], dim=-1)
    blind = AdaptiveTokenAggregation(iterations=20)(features, None, 1, 8, (12, 16), 8)
    aware = AdaptiveTokenAggregation(20.0, iterations=20)(features, attention, 1, 8, (12, 16), 8)
    assert objective(points, aware.assignment, 8).mean() < 0.99 * objective(points, blind.assignment, 8).mean()
    weightless = AdaptiveTokenAggregation(0.0, iterations=20)(features, attention, 1, 8, (12, 16), 8)
    assert_same(weightless, blind)


@pytest.mark.parametrize("clusters, limit", [(5, 1.10), (12, 1.05), (20, 1.05)])
def test_inertia_is_close_to_the_best_of_ten_restarts(clusters, limit):
    kmeans = pytest.importorskip("sklearn.cluster").KMeans
    features, _ = draw(12, (14, 14), width=256)
    points = F.normalize(features, dim=-1)
    result = AdaptiveTokenAggregation()(features, None, 1, clusters, grid=(14, 14), top_k=clusters)
    best = [kmeans(clusters, n_init=10, random_state=0).fit(image.numpy()).inertia_ for image in points]
    assert (objective(points, result.assignment, clusters) / torch.tensor(best)).mean() <= limit


@pytest.mark.parametrize("side", [8, 14, 28, 64])
def test_candidate_seeds_are_spread_over_rows_and_columns(side):
    candidates = spread_candidates(torch.tensor([[side**2]]), side**2)[0]
    assert len(candidates.unique()) == 64
    quarters = torch.stack([candidates // side * 4 // side, candidates % side * 4 // side])
    assert quarters.unique(dim=1).shape[1] == 16


def test_clearly_separate_regions_are_found():
    label = torch.arange(12)[:, None] // 4 * 4 + torch.arange(16) // 4
    features = F.one_hot(label.flatten()).float()[None] + 0.01 * torch.randn(1, 192, 12)
    result = AdaptiveTokenAggregation()(features, None, 1, 12, grid=(12, 16), top_k=12)
    pairs = torch.stack([label.flatten(), result.assignment.flatten()]).unique(dim=1)
    assert pairs.shape[1] == 12


# ---- Eq. 6 and 7


@pytest.mark.parametrize("alpha, beta, grid", [(1, 8, (12, 16)), (3, 6, (13, 11))])
def test_scores_equal_a_reference(alpha, beta, grid):
    weights = (0.7, 1.3, 0.4)
    features, attention = draw(3, grid)
    aggregate = AdaptiveTokenAggregation(iterations=40, score_weights=weights)
    result = aggregate(features, attention, alpha, beta, grid=grid, top_k=beta)
    unit = F.normalize(pool_features(features, grid, alpha), dim=-1).double().numpy()
    place = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 2)
    widest = ((grid[0] - 1) ** 2 + (grid[1] - 1) ** 2) / 4
    for image, slots in enumerate(result.assignment.flatten(1).numpy()):
        slot_of_cell = np.array([slots[patches[0]] for patches in cells_of(grid, alpha)])
        patches_of_cell = np.array([len(patches) for patches in cells_of(grid, alpha)])
        for slot in range(beta):
            member, center = place[slots == slot], unit[image, slot_of_cell == slot].mean(0)
            cosine = unit[image, slot_of_cell == slot] @ center / np.linalg.norm(center)
            coherence = np.average(cosine, weights=patches_of_cell[slot_of_cell == slot])
            dispersion = ((member - member.mean(0)) ** 2).sum(1).mean() / widest
            expected = np.dot(weights, [len(member) / len(slots), coherence, -dispersion])
            assert result.scores[image, slot].item() == pytest.approx(expected, abs=2e-5)


def test_the_best_clusters_are_kept_in_the_order_of_their_scores():
    features, attention = draw()
    everything = AdaptiveTokenAggregation()(features, attention, 1, 12, grid=(12, 16), top_k=12)
    kept = AdaptiveTokenAggregation()(features, attention, 1, 12, grid=(12, 16), top_k=7)
    assert (everything.scores.diff(dim=1) <= 0).all()
    assert torch.equal(kept.scores, everything.scores[:, :7])
    torch.testing.assert_close(kept.tokens, everything.tokens[:, :7])
    assert torch.equal(kept.assignment, everything.assignment.masked_fill(everything.assignment >= 7, -1))


def test_equal_scores_keep_the_order_of_the_clusters():
    label = torch.arange(15)[:, None] // 5 * 3 + torch.arange(15) // 5
    values = torch.linalg.qr(torch.randn(48, 9, generator=torch.Generator().manual_seed(0))).Q.mT
    result = AdaptiveTokenAggregation()(values[label.flatten()][None], None, 1, 9, grid=(15, 15), top_k=8)
    assert len(result.scores.unique()) == 1
    assert torch.equal(result.assignment[0], label.masked_fill(label == 8, -1))


def test_a_weight_on_size_alone_keeps_the_largest():
    features, attention = draw()
    aggregate = AdaptiveTokenAggregation(score_weights=(1.0, 0.0, 0.0))
    result = aggregate(features, attention, 1, 8, grid=(12, 16), top_k=8)
    size = one_hot(result.assignment, 8).sum(-1) / 192
    torch.testing.assert_close(result.scores.double(), size, atol=1e-5, rtol=0)


# ---- tokens, masks, assignment


@pytest.mark.parametrize("alpha, beta, top_k", LEVELS)
def test_tokens_are_the_means_of_their_original_patches(alpha, beta, top_k):
    features, attention = draw(grid=(13, 11))
    result = AdaptiveTokenAggregation()(features, attention, alpha, beta, grid=(13, 11), top_k=top_k)
    member = one_hot(result.assignment, top_k)
    assert torch.equal(member.sum(-1) > 0, result.mask)
    means = member @ features.double() / member.sum(-1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(result.tokens.double(), means, atol=1e-5, rtol=1e-5)
    assert result.assignment.min() >= -1 and result.assignment.max() < top_k


@pytest.mark.parametrize("alpha", [1, torch.tensor([2])])
@pytest.mark.parametrize("width", [32, 512])
@pytest.mark.parametrize("distinct", [1, 3, 9])
def test_equal_patches_share_one_token_and_the_other_slots_stay_empty(distinct, width, alpha):
    random = torch.Generator().manual_seed(distinct)
    label = torch.cat([torch.arange(distinct), torch.zeros(192 - distinct, dtype=torch.long)])
    label = label[torch.randperm(192, generator=random)].view(12, 16)
    label = label.repeat_interleave(int(alpha), 0).repeat_interleave(int(alpha), 1).flatten()
    grid = (12 * int(alpha), 16 * int(alpha))
    values = torch.randn(distinct, width, generator=random)
    result = AdaptiveTokenAggregation()(values[label][None], None, alpha, 24, grid=grid, top_k=20)
    assert result.mask.sum() == distinct
    assert torch.equal(result.mask, torch.arange(20)[None] < distinct)
    assert (result.tokens[~result.mask] == 0).all() and (result.scores[~result.mask] == 0).all()
    torch.testing.assert_close(result.tokens[0, result.assignment.flatten()], values[label], atol=1e-4, rtol=1e-4)


def test_more_clusters_than_cells_gives_one_token_per_cell():
    features, attention = draw(grid=(3, 5))
    result = AdaptiveTokenAggregation()(features, attention, 2, 24, grid=(3, 5), top_k=20)
    assert result.mask.sum(-1).tolist() == [6, 6, 6]


@pytest.mark.parametrize("grid, alpha", [((1, 1), 1), ((2, 2), 4), ((1, 30), 2)])
def test_small_and_narrow_grids_work(grid, alpha):
    features, attention = draw(grid=grid)
    result = AdaptiveTokenAggregation()(features, attention, alpha, 6, grid=grid, top_k=5)
    assert result.tokens.shape == (3, 5, 48) and result.mask[:, 0].all()
    assert result.scores.isfinite().all()


def test_blank_features_stay_finite():
    result = AdaptiveTokenAggregation()(torch.zeros(2, 16, 8), torch.zeros(2, 16, 16), 1, 6, grid=(4, 4), top_k=5)
    assert result.mask.sum(-1).tolist() == [1, 1]
    assert (result.tokens == 0).all() and result.scores.isfinite().all()


# ---- one image at a time, many at once


def test_an_image_does_not_notice_its_batch():
    features, attention = draw(5)
    aggregate = AdaptiveTokenAggregation()
    together = aggregate(features, attention, 1, 12, grid=(12, 16), top_k=10)
    for i in range(5):
        alone = aggregate(features[i : i + 1], attention[i : i + 1], 1, 12, grid=(12, 16), top_k=10)
        assert_same(alone, type(alone)(*(part[i : i + 1] for part in together)))


@pytest.mark.parametrize("with_attention", [True, False])
def test_mixed_granularities_equal_one_call_each(with_attention):
    features, attention = draw(3, (13, 11), noise=1.0)
    features = features - features.mean(1, keepdim=True)
    attention = attention if with_attention else None
    aggregate = AdaptiveTokenAggregation(relation_weight=5.0, iterations=3)
    mixed = aggregate(features, attention, *MIXED[:2], grid=(13, 11), top_k=MIXED[2])
    assert mixed.tokens.shape[1] == aggregate.max_clusters
    for i, (alpha, beta, top_k) in enumerate(LEVELS):
        own = None if attention is None else attention[i : i + 1]
        alone = aggregate(features[i : i + 1], own, alpha, beta, grid=(13, 11), top_k=top_k)
        assert not mixed.mask[i, top_k:].any() and (mixed.tokens[i, top_k:] == 0).all()
        mine = (mixed.tokens[i, :top_k], mixed.mask[i, :top_k], mixed.assignment[i], mixed.scores[i, :top_k])
        assert_same(alone, type(alone)(*(part[None] for part in mine)))


def test_ints_and_tensors_may_be_combined():
    features, attention = draw()
    aggregate = AdaptiveTokenAggregation()
    plain = aggregate(features, attention, 2, 12, grid=(12, 16), top_k=10)
    assert_same(plain, aggregate(features, attention, 2, torch.tensor([12] * 3), grid=(12, 16), top_k=10))


# ---- the way it computes


def test_repeats_exactly_and_leaves_the_random_state_alone():
    features, attention = draw()
    state = torch.get_rng_state()
    first, second = (AdaptiveTokenAggregation()(features, attention, 1, 24, (12, 16), 20) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_holds_no_state():
    aggregate = AdaptiveTokenAggregation()
    assert not list(aggregate.parameters()) and not list(aggregate.buffers())


class NoHostRead(TorchDispatchMode):
    """Raises where the host would wait for a value: item(), bool(), nonzero, boolean indexing, a copy to the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique2"}, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("alpha, beta, top_k", [(1, 24, 20), (2, 12, 10), MIXED])
def test_the_host_never_waits_for_a_value(alpha, beta, top_k):
    features, attention = draw()
    with NoHostRead():
        result = AdaptiveTokenAggregation()(features, attention, alpha, beta, grid=(12, 16), top_k=top_k)
    on_meta = (x.to("meta") if isinstance(x, torch.Tensor) else x for x in (features, attention, alpha, beta, top_k))
    features, attention, alpha, beta, top_k = on_meta  # a meta tensor has no values to wait for
    shapes = AdaptiveTokenAggregation()(features, attention, alpha, beta, grid=(12, 16), top_k=top_k)
    assert [part.shape for part in shapes] == [part.shape for part in result]


@pytest.mark.parametrize("alpha, beta, top_k", [(2, 5, 4), MIXED])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks_and_equals_eager(backend, alpha, beta, top_k):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    torch.compiler.reset()
    features, attention = draw(grid=(8, 9))
    aggregate = AdaptiveTokenAggregation(max_clusters=6)
    compiled = torch.compile(aggregate, fullgraph=True, backend=backend)
    arguments = (features, attention, alpha, beta, (8, 9), top_k)
    assert_same(aggregate(*arguments), compiled(*arguments))


def test_gradients_flow_through_the_means():
    features, attention = draw(grid=(7, 9))
    features.requires_grad_()
    result = AdaptiveTokenAggregation()(features, attention.requires_grad_(), 2, 6, grid=(7, 9), top_k=4)
    upstream = torch.randn_like(result.tokens)
    (gradient,) = torch.autograd.grad(result.tokens, features, upstream)
    member = one_hot(result.assignment, 4)
    expected = (member / member.sum(-1, keepdim=True)).mT @ upstream.double()
    torch.testing.assert_close(gradient.double(), expected, atol=1e-6, rtol=1e-5)
    assert not result.scores.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    features, attention = draw()
    half = AdaptiveTokenAggregation()(features.to(dtype), attention, 1, 12, grid=(12, 16), top_k=10)
    single = AdaptiveTokenAggregation()(features.to(dtype).float(), attention, 1, 12, grid=(12, 16), top_k=10)
    assert half.tokens.dtype == dtype and half.scores.dtype == torch.float32
    assert torch.equal(half.assignment, single.assignment)
    assert torch.equal(half.tokens, single.tokens.to(dtype))


def test_autocast_changes_nothing():
    features, attention = draw()
    plain = AdaptiveTokenAggregation()(features, attention, 1, 12, grid=(12, 16), top_k=10)
    with torch.autocast("cpu", torch.bfloat16):
        cast = AdaptiveTokenAggregation()(features, attention, 1, 12, grid=(12, 16), top_k=10)
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))
