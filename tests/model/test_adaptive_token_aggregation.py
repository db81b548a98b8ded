"""AdaTA (Eq. 4-7): pooling, relation-aware clustering, refinement on patches, quality filter, token means.

The features are drawn: smooth regions of an image plane, a few slow waves and noise in each patch, with neighbours
about as alike as those of a vision transformer. The attention follows regions of its own.
"""

import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_granulon import adaptive_token_aggregation as module
from modeling_granulon.adaptive_token_aggregation import (
    AdaptiveTokenAggregation,
    Groups,
    fill_empty_clusters,
    fold,
    kept_tokens,
    pool_features,
    quality_terms,
    spread_candidates,
)

LEVELS = [(1, 24, 20), (2, 12, 10), (4, 6, 5), (3, 9, 9)]  # alpha, beta, top_k
every_level = pytest.mark.parametrize("alpha, beta, top_k", LEVELS)


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


def points_of(features, attention, relation_weight):
    """What Eq. 5 clusters: [a, sqrt(lambda) sqrt(A)]."""
    unit = F.normalize(features, dim=-1)
    return torch.cat([unit, (relation_weight * attention / attention.sum(-1, keepdim=True)).sqrt()], dim=-1)


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
    for name in ("tokens", "scores", "geometry"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=2e-5, rtol=1e-5)
    assert torch.equal(one.mask, other.mask)
    assert torch.equal(one.assignment, other.assignment)


# ---- Eq. 4


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 9])
def test_pooling_is_the_mean_over_cells_with_smaller_ones_at_the_border(stride):
    grid = (7, 9)
    features, _ = draw(2, grid, width=5)
    averaging = np.zeros((63, len(cells_of(grid, stride))))
    for cell, patches in enumerate(cells_of(grid, stride)):
        averaging[patches, cell] = 1 / len(patches)
    np.testing.assert_allclose(pool_features(features, grid, stride), averaging.T @ features.numpy(), atol=1e-6)


def test_rows_of_attention_are_rescaled_to_one():
    features, attention = draw()
    scale = 1 + torch.arange(192)[:, None]
    one, other = (AdaptiveTokenAggregation()(features, x, 1, 12, (12, 16), 10) for x in (attention, attention * scale))
    assert_same(one, other)


def test_attention_may_come_summed_over_groups_of_columns():
    features, attention = draw()
    groups = attention.unflatten(2, (-1, 4)).sum(-1)
    result = AdaptiveTokenAggregation(4.0, 2, 60)(features, groups, 2, 8, (12, 16), 8)
    distance = deviations(points_of(features, groups, 4.0), result.assignment, 8)
    own = distance.gather(2, result.assignment.flatten(1)[..., None])[..., 0]
    assert (own <= distance.amin(-1) + 1e-5).all()


# ---- Eq. 5


@pytest.mark.parametrize("relation_weight", [0.0, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("alpha, clusters", [(1, 10), (2, 12), (3, 7), (5, 6)])
def test_no_round_of_refinement_raises_the_objective(alpha, clusters, relation_weight):
    features, attention = draw(6, noise=1.0)
    points = points_of(features, attention, relation_weight)
    values = []
    for rounds in range(8):
        aggregate = AdaptiveTokenAggregation(relation_weight, 2, rounds)
        result = aggregate(features, attention, alpha, clusters, (12, 16), clusters)
        values.append(objective(points, result.assignment, clusters))
    steps = torch.stack(values).diff(dim=0)
    assert (steps <= 1e-4).all()
    assert steps.sum() < 0


@pytest.mark.parametrize("alpha", [1, 2, 4])
def test_at_rest_every_patch_is_nearest_to_its_own_centre(alpha):
    features, attention = draw(4)
    result = AdaptiveTokenAggregation(3.0, 2, 40)(features, attention, alpha, 8, (12, 16), 8)
    distance = deviations(points_of(features, attention, 3.0), result.assignment, 8)
    own = distance.gather(2, result.assignment.flatten(1)[..., None])[..., 0]
    assert (own <= distance.amin(-1) + 1e-5).all()


@every_level
def test_the_relation_term_acts_at_every_stride_at_its_default_weight(alpha, beta, top_k):
    features, attention = draw(4)
    blind = AdaptiveTokenAggregation()(features, None, alpha, beta, (12, 16), top_k)
    aware = AdaptiveTokenAggregation()(features, attention, alpha, beta, (12, 16), top_k)
    weightless = AdaptiveTokenAggregation(relation_weight=0.0)(features, attention, alpha, beta, (12, 16), top_k)
    assert_same(weightless, blind)
    assert ((aware.tokens - blind.tokens).abs().amax((1, 2)) > 0.01).all()
    points = points_of(features, attention, AdaptiveTokenAggregation().relation_weight)
    gain = objective(points, aware.assignment, top_k) / objective(points, blind.assignment, top_k)
    assert gain.mean() < 0.99


def test_a_coarse_level_follows_regions_and_not_its_cells():
    label = (torch.cartesian_prod(torch.arange(16), torch.arange(16)).sub(8).square().sum(-1) < 30).long()
    features = F.one_hot(label, 8).float()[None] + 0.02 * torch.randn(1, 256, 8)
    result = AdaptiveTokenAggregation()(features, None, 4, 2, (16, 16), 2)
    assert len(torch.stack([label, result.assignment.flatten()]).unique(dim=1).T) == 2


@pytest.mark.parametrize("width, folded", [(48, 48), (128, 128), (200, 128), (384, 128), (1024, 128)])
def test_folding_keeps_distances_between_patches(width, folded):
    features, _ = draw(2, width=width)
    narrow = fold(features)
    assert narrow.shape[-1] == folded
    before, after = (torch.cdist(x, x)[:, *torch.triu_indices(192, 192, 1)] for x in (features, narrow))
    assert torch.stack([before.flatten(), after.flatten()]).corrcoef()[0, 1] > 0.9
    assert (after / before).mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("alpha, clusters", [(1, 24), (2, 12), (4, 6)])
def test_folding_costs_little_of_the_objective(alpha, clusters, monkeypatch):
    features, attention = draw(4, width=768)
    folded = AdaptiveTokenAggregation()(features, attention, alpha, clusters, (12, 16), clusters)
    monkeypatch.setattr(module, "FOLDED_WIDTH", 768)
    whole = AdaptiveTokenAggregation()(features, attention, alpha, clusters, (12, 16), clusters)
    points = points_of(features, attention, 3.0)
    ratio = objective(points, folded.assignment, clusters) / objective(points, whole.assignment, clusters)
    assert ratio.mean() < 1.03


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
    candidates = spread_candidates(side**2, 64, torch.device("cpu"))
    assert len(candidates.unique()) == 64 and candidates.max() < side**2
    quarters = torch.stack([candidates // side * 4 // side, candidates % side * 4 // side])
    assert quarters.unique(dim=1).shape[1] == 16


def test_clearly_separate_regions_are_found():
    label = torch.arange(12)[:, None] // 4 * 4 + torch.arange(16) // 4
    features = F.one_hot(label.flatten()).float()[None] + 0.01 * torch.randn(1, 192, 12)
    result = AdaptiveTokenAggregation()(features, None, 1, 12, grid=(12, 16), top_k=12)
    pairs = torch.stack([label.flatten(), result.assignment.flatten()]).unique(dim=1)
    assert pairs.shape[1] == 12


# ---- every slot is used, every patch has one


@pytest.mark.parametrize("grid", [(12, 16), (7, 9), (3, 5), (1, 30), (2, 2), (1, 1)])
@pytest.mark.parametrize("content", ["drawn", "flat", "zero", "two values", "noise"])
@every_level
def test_the_number_of_tokens_depends_on_level_and_grid_alone(content, grid, alpha, beta, top_k):
    features, attention = draw(2, grid)
    if content == "flat":
        features, attention = features[:, :1].expand_as(features), torch.ones_like(attention)
    elif content == "zero":
        features, attention = torch.zeros_like(features), torch.zeros_like(attention)
    elif content == "two values":
        features = torch.where(torch.arange(features.shape[1])[:, None] % 3 == 0, features[:, :1], -features[:, :1])
    elif content == "noise":
        features = torch.randn_like(features)
    result = AdaptiveTokenAggregation()(features, attention, alpha, beta, grid, top_k)
    kept = kept_tokens(grid, alpha, beta, top_k)
    assert kept == min(top_k, beta, len(cells_of(grid, alpha)))
    assert torch.equal(result.mask, (torch.arange(top_k) < kept).expand(2, -1))
    assert all(sorted(image.unique().tolist()) == list(range(kept)) for image in result.assignment)
    for part in (result.tokens, result.scores, result.geometry):
        assert part.isfinite().all() and (part[:, kept:] == 0).all()


def test_an_empty_cluster_takes_the_farthest_patch_that_its_cluster_can_spare():
    cluster = torch.tensor([[0, 0, 0, 2, 2, 3]])
    gain = torch.tensor([5.0, 2.0, 3.0, 4.0, 1.0, 0.0])[None, :, None].expand(-1, -1, 6)
    # patch 5 is alone in its cluster; the farthest others are 4, 1, 2, of which none is the best of its cluster
    assert fill_empty_clusters(cluster, gain).tolist() == [[0, 4, 5, 2, 1, 3]]


# ---- Eq. 6 and 7


def test_each_quality_term_says_what_it_should():
    label = torch.zeros(16, 16, dtype=torch.long)
    label[2:6, 2:6] = 1  # a square of 16 patches
    label[8:, 8:][::2, ::2] = 2  # 16 patches far apart
    label[12, 1] = 3
    features = torch.linalg.qr(torch.randn(32, 4, generator=torch.Generator().manual_seed(0))).Q.mT[label.flatten()]
    features[label.flatten() == 1] += 0.3 * torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    points = F.normalize(features, dim=-1)[None]
    groups = Groups.of(label.flatten()[None], 4)
    size, coherence, dispersion = (term[0] for term in quality_terms(groups, points, groups.means(points), (16, 16)))
    torch.testing.assert_close(size, torch.tensor([1.0, 0.25, 0.25, 1 / 64]))
    assert (coherence[[0, 2, 3]] > 0.999).all() and 0.3 < coherence[1] < 0.9
    assert dispersion[1] < 0.1 and dispersion[3] < 0.1 and dispersion[2] > 0.7


@every_level
def test_every_quality_term_varies_over_the_clusters(alpha, beta, top_k):
    features, attention = draw(6)
    scores = [
        AdaptiveTokenAggregation(score_weights=eta)(features, attention, alpha, beta, (12, 16), beta).scores
        for eta in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    ]
    assert all(score.std() > 0.05 for score in scores)


@pytest.mark.parametrize("alpha, beta, grid", [(1, 8, (12, 16)), (3, 6, (13, 11))])
def test_scores_equal_a_reference(alpha, beta, grid):
    weights = (0.7, 1.3, 0.4)
    features, attention = draw(3, grid)
    aggregate = AdaptiveTokenAggregation(2.0, 2, 40, score_weights=weights)
    result = aggregate(features, attention, alpha, beta, grid=grid, top_k=beta)
    points = points_of(features, attention, 2.0).double().numpy()
    place = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 2)
    for image, slots in enumerate(result.assignment.flatten(1).numpy()):
        for slot in range(beta):
            member, own = place[slots == slot], points[image, slots == slot]
            within = ((own - own.mean(0)) ** 2).sum(1).mean()
            coherence = 1 - within / ((own - points[image].mean(0)) ** 2).sum(1).mean()
            variance = ((member - member.mean(0)) ** 2).sum(1).mean()
            dispersion = 1 - len(member) / (2 * np.pi) / (variance + 1 / 6)
            size = min(1, len(member) * beta / len(slots))
            expected = np.dot(weights, [size, coherence, -dispersion])
            assert result.scores[image, slot].item() == pytest.approx(expected, abs=2e-4)


def test_patches_of_dropped_clusters_join_the_nearest_kept_one():
    features, attention = draw()
    result = AdaptiveTokenAggregation(3.0, 2, 40)(features, attention, 1, 12, (12, 16), 7)
    everything = AdaptiveTokenAggregation(3.0, 2, 40)(features, attention, 1, 12, (12, 16), 12)
    assert torch.equal(result.scores, everything.scores[:, :7])
    stayed = everything.assignment < 7
    assert torch.equal(result.assignment[stayed], everything.assignment[stayed])
    points, member = points_of(features, attention, 3.0).double(), one_hot(everything.assignment, 12)
    centers = (member @ points / member.sum(-1, keepdim=True))[:, :7]
    assert torch.equal(torch.cdist(points, centers).argmin(-1), result.assignment.flatten(1))


def test_equal_scores_keep_the_order_of_the_clusters():
    label = torch.arange(15)[:, None] // 5 * 3 + torch.arange(15) // 5
    values = torch.linalg.qr(torch.randn(48, 9, generator=torch.Generator().manual_seed(0))).Q.mT
    result = AdaptiveTokenAggregation()(values[label.flatten()][None], None, 1, 9, grid=(15, 15), top_k=9)
    assert len(result.scores.unique()) == 1
    assert torch.equal(result.assignment[0], label)


@pytest.mark.parametrize("rounds", [(0, 0), (2, 0), (0, 2), (1, 1)])
@pytest.mark.parametrize("alpha", [1, 3])
def test_scores_and_geometry_are_of_patches_whatever_the_rounds(alpha, rounds):
    features, attention = draw()
    aggregate = AdaptiveTokenAggregation(3.0, *rounds, score_weights=(1.0, 0.0, 0.0))
    result = aggregate(features, attention, alpha, 8, (12, 16), 8)
    size = (one_hot(result.assignment, 8).sum(-1) / 192 * 8).clamp(max=1)
    assert (result.scores - size).abs().mean() < 0.2  # the last assignment may move a few patches
    torch.testing.assert_close(result.geometry[..., 4].exp().sum(-1), torch.ones(3))


def test_a_weight_on_size_alone_keeps_the_largest():
    features, attention = draw()
    aggregate = AdaptiveTokenAggregation(refinement_iterations=40, score_weights=(1.0, 0.0, 0.0))
    result = aggregate(features, attention, 1, 8, grid=(12, 16), top_k=8)
    size = (one_hot(result.assignment, 8).sum(-1) / 192 * 8).clamp(max=1)
    torch.testing.assert_close(result.scores.double(), size, atol=1e-5, rtol=0)


# ---- tokens and geometry


@pytest.mark.parametrize("grid", [(12, 16), (13, 11)])
@every_level
def test_tokens_are_the_means_of_their_original_patches(alpha, beta, top_k, grid):
    features, attention = draw(grid=grid)
    result = AdaptiveTokenAggregation()(features, attention, alpha, beta, grid=grid, top_k=top_k)
    member = one_hot(result.assignment, top_k)
    assert torch.equal(member.sum(-1) > 0, result.mask)
    means = member @ features.double() / member.sum(-1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(result.tokens.double(), means, atol=1e-5, rtol=1e-5)


def test_geometry_says_where_a_cluster_lies_and_how_large_it_is():
    grid = (10, 20)
    features, attention = draw(2, grid)
    result = AdaptiveTokenAggregation()(features, attention, 2, 8, grid, 6)
    place = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1)
    for image in range(2):
        for slot in range(6):
            member = place[result.assignment[image].numpy() == slot]
            centroid, spread = (2 * member.mean(0) + 1) / grid - 1, member.std(0) / grid
            expected = [*centroid, *spread, np.log(len(member) / 200)]
            np.testing.assert_allclose(result.geometry[image, slot], expected, atol=1e-5)


# ---- one image at a time, many at once


@every_level
def test_an_image_does_not_notice_its_batch(alpha, beta, top_k):
    features, attention = draw(5, (11, 14))
    aggregate = AdaptiveTokenAggregation()
    together = aggregate(features, attention, alpha, beta, grid=(11, 14), top_k=top_k)
    for i in range(5):
        alone = aggregate(features[i : i + 1], attention[i : i + 1], alpha, beta, grid=(11, 14), top_k=top_k)
        assert_same(alone, type(alone)(*(part[i : i + 1] for part in together)))


def test_repeats_exactly_and_leaves_the_random_state_alone():
    features, attention = draw()
    state = torch.get_rng_state()
    first, second = (AdaptiveTokenAggregation()(features, attention, 1, 24, (12, 16), 20) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


# ---- how it computes


def test_holds_no_state():
    aggregate = AdaptiveTokenAggregation()
    assert not list(aggregate.parameters()) and not list(aggregate.buffers())


class NoHostRead(TorchDispatchMode):
    """Raises where the host would wait for a value: item(), bool(), nonzero, boolean indexing, a copy to the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique2"}, name
        return func(*args, **(kwargs or {}))


@every_level
def test_the_host_never_waits_for_a_value(alpha, beta, top_k):
    features, attention = draw()
    with NoHostRead():
        result = AdaptiveTokenAggregation()(features, attention, alpha, beta, grid=(12, 16), top_k=top_k)
    features, attention = features.to("meta"), attention.to("meta")  # has no values to wait for
    shapes = AdaptiveTokenAggregation()(features, attention, alpha, beta, grid=(12, 16), top_k=top_k)
    assert [part.shape for part in shapes] == [part.shape for part in result]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("alpha, beta, top_k", [(2, 5, 4), (1, 6, 8)])
def test_compiles_without_graph_breaks_and_equals_eager(backend, alpha, beta, top_k):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    torch.compiler.reset()
    features, attention = draw(grid=(8, 9))
    aggregate = AdaptiveTokenAggregation()
    compiled = torch.compile(aggregate, fullgraph=True, backend=backend)
    arguments = (features, attention, alpha, beta, (8, 9), top_k)
    assert_same(aggregate(*arguments), compiled(*arguments))


@pytest.mark.parametrize("alpha, beta, top_k", [(2, 5, 4), (1, 6, 8)])
def test_exports_and_equals_eager(alpha, beta, top_k):
    features, attention = draw(grid=(8, 9))
    arguments = (features, attention, alpha, beta, (8, 9), top_k)
    exported = torch.export.export(AdaptiveTokenAggregation(), arguments).module()
    assert_same(AdaptiveTokenAggregation()(*arguments), exported(*arguments))


def test_gradients_flow_through_the_means():
    features, attention = draw(grid=(7, 9))
    features.requires_grad_()
    result = AdaptiveTokenAggregation()(features, attention.requires_grad_(), 2, 6, grid=(7, 9), top_k=4)
    upstream = torch.randn_like(result.tokens)
    (gradient,) = torch.autograd.grad(result.tokens, features, upstream)
    member = one_hot(result.assignment, 4)
    expected = (member / member.sum(-1, keepdim=True)).mT @ upstream.double()
    torch.testing.assert_close(gradient.double(), expected, atol=1e-6, rtol=1e-5)
    assert not result.scores.requires_grad and not result.geometry.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype):
    features, attention = draw()
    half = AdaptiveTokenAggregation()(features.to(dtype), attention, 1, 12, grid=(12, 16), top_k=10)
    single = AdaptiveTokenAggregation()(features.to(dtype).float(), attention, 1, 12, grid=(12, 16), top_k=10)
    assert half.tokens.dtype == dtype and half.scores.dtype == half.geometry.dtype == torch.float32
    assert torch.equal(half.assignment, single.assignment)
    assert torch.equal(half.tokens, single.tokens.to(dtype))


def test_autocast_changes_nothing():
    features, attention = draw()
    plain = AdaptiveTokenAggregation()(features, attention, 1, 12, grid=(12, 16), top_k=10)
    with torch.autocast("cpu", torch.bfloat16):
        cast = AdaptiveTokenAggregation()(features, attention, 1, 12, grid=(12, 16), top_k=10)
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))
