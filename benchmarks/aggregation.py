"""AdaTA against other ways to make a few tokens of many: time, quality of the clusters, memory.

    python benchmarks/aggregation.py > benchmarks/results/aggregation.md

The other methods are re-implemented here from their papers and code, compactly and each in its own manner: the batched
ones batched, the looping ones looping. Progress goes to stderr.
"""

import argparse
import platform

import sklearn
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_sample_images
from timing import interleaved, machine, milliseconds, table
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_granulon import AdaptiveTokenAggregation

CLUSTERS, KEPT = 24, 20  # the fine level, alpha = 1: the dearest
GOALS = {196: 5, 576: 8, 784: 12, 1024: 12, 4096: 50}  # patches: how many times faster than the authors' k-means
SHARES = {"ToMe": 1 / 2, "DPC-KNN": 1 / 2, "VisionZip": 1 / 3, "fast_pytorch_kmeans": 1 / 4}
MEMORY = 1.5
INERTIA = {5: 1.10, 12: 1.05, 20: 1.05, 24: 1.05}
OBSTACLES = {
    "VisionZip": "It clusters nothing: the patches join the nearest of evenly spaced ones in one product and one sum, "
    "which is close to the floor; k-means with a round on all features cannot take a third of that.",
    "ToMe": "Halving the patches a few times costs one product of N/2 x N/2 x D and little else, so at few patches it "
    "is within a small factor of the floor, and AdaTA pays the seeds and a round of k-means.",
    "24 clusters": "Two rounds, the default, stop short of rest for speed; `cluster_iterations=3` is the remedy.",
}
PREFACE = """\
# Aggregation

`python benchmarks/aggregation.py{arguments}`: {machine}, scikit-learn {sklearn}, Python {python}; features of width
{width} in float32, medians of {rounds} interleaved rounds{few}.

The level is the fine one (alpha 1, {clusters} clusters, {kept} kept), the dearest. The features are drawn, since no
pretrained encoder comes with the repository: smooth regions, slow waves and noise in every patch; the attention is the
row-softmax of their cosines. "Authors" is the algorithm of the published code: k-means on the rows of the N x N cosine
matrix, random seeds, up to 100 rounds with a convergence check on the host, one image at a time. "Floor" is one read
of the features and the attention, one N x D x K product and one mean over segments. "Compiled" is `torch.compile` with
`fullgraph=True`; the other methods run as they are published, eagerly."""


# ---- what is clustered


def drawn_features(images: int, side: int, width: int, seed: int = 0) -> Tensor:
    """(I, N, D): regions with soft borders, slow waves, and noise that differs from patch to patch."""
    random = torch.Generator().manual_seed(seed)
    line = torch.linspace(0, 1, side)
    place_N2 = torch.cartesian_prod(line, line)
    drawn = []
    for _ in range(images):
        regions = int(torch.randint(8, 28, (1,), generator=random))
        region_NR = (-40 * torch.cdist(place_N2, torch.rand(regions, 2, generator=random))).softmax(-1)
        wave_NW = torch.sin(4 * place_N2 @ torch.randn(2, 12, generator=random))
        noise_ND = torch.randn(side**2, width, generator=random) * torch.rand(side**2, 1, generator=random).add(0.5)
        clean_ND = region_NR @ torch.randn(regions, width, generator=random)
        waves_ND = wave_NW @ torch.randn(12, width, generator=random)
        drawn.append(clean_ND + 0.25 * waves_ND + 0.6 * noise_ND + 0.6 * torch.randn(1, width, generator=random))
    return torch.stack(drawn)


def photo_features(images: int, side: int, width: int, seed: int = 0) -> Tensor:
    """(I, N, D): crops of scikit-learn's two photographs, seen by fixed random filters at three scales."""
    random = torch.Generator().manual_seed(seed)
    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1).float() for photo in load_sample_images().images]
    filters = [torch.randn(256, 3, size, size, generator=random) / size for size in (8, 16, 24)]
    mixing = torch.randn(768, width, generator=random) / 768**0.5
    seen = []
    for image in range(images):
        photo_3HW = photos[image % 2]
        size = int(torch.randint(200, 420, (1,), generator=random))
        top, left = (int(torch.randint(length - size + 1, (1,), generator=random)) for length in photo_3HW.shape[1:])
        crop = photo_3HW[None, :, top : top + size, left : left + size]
        crop = F.interpolate(crop, (8 * side, 8 * side), mode="bilinear", antialias=True)
        crop = (crop - crop.mean()) / crop.std()
        wider = [F.pad(crop, (bank.shape[-1] // 2 - 4,) * 4, mode="reflect") for bank in filters]
        maps = [F.conv2d(padded, bank, stride=8).relu() for padded, bank in zip(wider, filters, strict=True)]
        seen.append(torch.tanh(torch.cat(maps, dim=1).flatten(2).mT[0] @ mixing))
    return torch.stack(seen)


# ---- the other methods


def authors_kmeans(features: Tensor, clusters: int = CLUSTERS) -> list[Tensor]:
    """k-means on the rows of the cosine matrix, image by image, until the centres rest."""
    tokens = []
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
    return tokens


def fast_pytorch_kmeans(features: Tensor, clusters: int = CLUSTERS) -> list[Tensor]:
    """k-means on the features, image by image, random seeds, until the squared shift of the centres is below 1e-4."""
    tokens = []
    for patches_ND in features:
        order = torch.randperm(len(patches_ND), generator=torch.Generator().manual_seed(42))
        centers_KD = patches_ND[order[:clusters].to(patches_ND.device)]
        index_K1 = torch.arange(clusters, device=patches_ND.device)[:, None]
        for _ in range(100):
            similar_NK = 2 * patches_ND @ centers_KD.T - centers_KD.square().sum(1)
            similar_NK = similar_NK - patches_ND.square().sum(1, keepdim=True)
            member_KN = (similar_NK.max(-1).indices[None] == index_K1).to(patches_ND.dtype)
            moved_KD = (member_KN @ patches_ND / member_KN.sum(-1, keepdim=True)).nan_to_num()
            shift = (moved_KD - centers_KD).square().sum()
            centers_KD = moved_KD
            if shift <= 1e-4:
                break
        tokens.append(centers_KD)
    return tokens


def tome(features: Tensor, kept: int = KEPT) -> Tensor:
    """Token merging: every other patch joins its most similar partner, at most half a step, until `kept` are left."""
    size_IN1 = features.new_ones(*features.shape[:2], 1)
    while features.shape[1] > kept:
        count, width = features.shape[1:]
        merged = min(count // 2, count - kept)
        unit_IND = F.normalize(features, dim=-1)
        best = (unit_IND[:, ::2] @ unit_IND[:, 1::2].mT).max(-1)
        order_IN1 = best.values.argsort(-1, descending=True)[..., None]
        stay_IN1, source_IN1 = order_IN1[:, merged:], order_IN1[:, :merged]
        target_IN1 = best.indices[..., None].gather(1, source_IN1)
        parts = []
        for values in (features * size_IN1, size_IN1):
            span = (-1, -1, values.shape[-1])
            source = values[:, ::2].gather(1, source_IN1.expand(span))
            target = values[:, 1::2].scatter_reduce(1, target_IN1.expand(span), source, reduce="sum")
            parts.append(torch.cat([values[:, ::2].gather(1, stay_IN1.expand(span)), target], dim=1))
        features, size_IN1 = parts[0] / parts[1], parts[1]
    return features


def dpc_knn(features: Tensor, clusters: int = CLUSTERS, neighbours: int = 5) -> Tensor:
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
    return (sums / flat.bincount(minlength=images * clusters).clamp_min(1)[:, None]).unflatten(0, (images, clusters))


def visionzip(features: Tensor, attention: Tensor, kept: int = KEPT) -> Tensor:
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
    return torch.cat([chosen_IND, rest_IND[:, anchors] + merged_IKD], dim=1)


# ---- what is measured


def methods(features: Tensor, attention: Tensor, side: int) -> dict:
    aggregate = AdaptiveTokenAggregation()
    torch.compiler.reset()
    compiled = torch.compile(aggregate, fullgraph=True, dynamic=False)
    images, patches, width = features.shape
    centers_IKD = features[:, :CLUSTERS].contiguous()
    segment = torch.arange(images * patches, device=features.device) * CLUSTERS // patches

    def floor():
        sums = torch.zeros(images * CLUSTERS, width, device=features.device)
        return (
            (features.sum(), attention.sum(), features @ centers_IKD.mT),
            sums.index_add_(0, segment, features.flatten(0, 1)) / (patches / CLUSTERS),
        )

    return {
        "authors": lambda: authors_kmeans(features),
        "AdaTA": lambda: aggregate(features, attention, 1, CLUSTERS, (side, side), KEPT),
        "AdaTA compiled": lambda: compiled(features, attention, 1, CLUSTERS, (side, side), KEPT),
        "floor": floor,
        "ToMe": lambda: tome(features),
        "DPC-KNN": lambda: dpc_knn(features),
        "VisionZip": lambda: visionzip(features, attention),
        "fast_pytorch_kmeans": lambda: fast_pytorch_kmeans(features),
    }


def peak_bytes(call, device: str) -> int:
    """The most memory that a call holds at once beyond its arguments; its result included."""
    call()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


class HostReads(TorchDispatchMode):
    """Counts the operations for which the host waits for a value."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in {"_local_scalar_dense", "nonzero", "equal", "unique2"}
        return func(*args, **(kwargs or {}))


def inertia(unit_IND: Tensor, label_IN: Tensor, clusters: int) -> Tensor:
    member_IKN = (label_IN[:, None] == torch.arange(clusters)[:, None]).float()
    centers_IKD = member_IKN @ unit_IND / member_IKN.sum(-1, keepdim=True).clamp_min(1)
    return (unit_IND - member_IKN.mT @ centers_IKD).square().sum((1, 2))


def quality(images: int, side: int, width: int) -> list[list]:
    """Rows of mean inertia over that of scikit-learn's best of ten restarts, at lambda_f = 0; then with 3 rounds."""
    kinds = [F.normalize(draw(images, side, width, seed=1), dim=-1) for draw in (drawn_features, photo_features)]
    rows = []
    for clusters, goal in INERTIA.items():
        ratios = []
        for unit_IND, rounds in zip([*kinds, *kinds], (2, 2, 3, 3), strict=True):
            aggregate = AdaptiveTokenAggregation(iterations=rounds)
            result = aggregate(unit_IND, None, 1, clusters, (side, side), clusters)
            best = [KMeans(clusters, n_init=10, random_state=0).fit(unit.numpy()).inertia_ for unit in unit_IND]
            reached_I = inertia(unit_IND, result.assignment.flatten(1), clusters)
            ratios.append((reached_I / torch.tensor(best)).mean().item())
        met = verdict(max(ratios[:2]) <= goal)
        rows.append([f"{clusters} clusters", *(f"{ratio:.3f}" for ratio in ratios), f"≤ {goal:.2f}", met])
    return rows


def host_reads_and_graph_breaks() -> tuple[int, int]:
    features = drawn_features(2, 14, 64)
    attention = cosine_attention(features)
    aggregate = AdaptiveTokenAggregation()
    with HostReads() as reads:
        aggregate(features, attention, 1, CLUSTERS, (14, 14), KEPT)
    torch.compiler.reset()
    explanation = torch._dynamo.explain(aggregate)(features, attention, 1, CLUSTERS, (14, 14), KEPT)
    return reads.count, explanation.graph_break_count


def cosine_attention(features: Tensor) -> Tensor:
    unit = F.normalize(features, dim=-1)
    return (10 * unit @ unit.mT).softmax(-1)


# ---- the report


def verdict(met: bool) -> str:
    return "met" if met else "**not met**"


def obstacles(rows: list[list]) -> list[str]:
    """A sentence for each goal that was not met."""
    return [f"\n{row[0]}: {OBSTACLES[row[0]]}" for row in rows if "not" in row[-1] and row[0] in OBSTACLES]


def speed_rows(results: dict[int, tuple[int, dict[str, float]]]) -> list[list]:
    rows = []
    for patches, (images, seconds) in results.items():
        eager, compiled = (seconds["authors"] / seconds[name] for name in ("AdaTA", "AdaTA compiled"))
        times = [milliseconds(seconds[name]) for name in ("authors", "AdaTA", "AdaTA compiled", "floor")]
        goal = f"≥ {GOALS[patches]}x, eager ≥ 1x"
        met = compiled >= GOALS[patches] and eager >= 1
        rows.append([f"{patches} x {images}", *times, f"{eager:.1f}x", f"{compiled:.1f}x", goal, verdict(met)])
    return rows


def share_rows(results: dict[int, tuple[int, dict[str, float]]]) -> list[list]:
    rows = []
    for method, goal in SHARES.items():
        shares = [seconds["AdaTA compiled"] / seconds[method] for _, seconds in results.values()]
        rows.append([method, *(f"{share:.2f}" for share in shares), f"≤ {goal:.2f}", verdict(max(shares) <= goal)])
    return rows


def report(results: dict, memory: list[list], qualities: list[list], reads: int, breaks: int) -> str:
    sizes = [f"{patches} x {images}" for patches, (images, _) in results.items()]
    shares = share_rows(results)
    lines = [
        "## Against the authors' k-means\n",
        table(
            ["patches x images", "authors ms", "AdaTA ms", "compiled ms", "floor ms"]
            + ["authors / AdaTA", "authors / compiled", "goal", ""],
            speed_rows(results),
        ),
        "\n## Against other methods: time of AdaTA compiled over theirs\n",
        table(["method", *sizes, "goal", ""], shares),
        *obstacles(shares),
        "\n## Quality: mean inertia over that of scikit-learn's best of ten restarts, attention left out\n",
        table(
            ["", "drawn features", "photographs", "drawn, 3 rounds", "photographs, 3 rounds", "goal", ""], qualities
        ),
        *obstacles(qualities),
        "\n## Memory: the most that is held beyond the arguments, over the bytes of features and attention\n",
        table(["patches x images", "features and attention MB", "eager", "compiled", "goal", ""], memory),
        f"\nHost reads: {reads} (goal 0). Graph breaks: {breaks} (goal 0).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="width of the features (1024)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of which the median is taken (15)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--quick", action="store_true", help="three rounds, up to 576 patches, two images")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    sides = {14: 8, 24: 8, 28: 8, 32: 8, 64: 1}  # images of each side
    if options.quick:
        options.rounds, sides = 3, {14: 2, 24: 2}
    results, memory = {}, []
    for side, images in sides.items():
        features = drawn_features(images, side, options.width).to(device)
        attention = cosine_attention(features)
        calls = methods(features, attention, side)
        rounds = options.rounds if side < 64 else min(options.rounds, 5)
        results[side**2] = images, interleaved(calls, rounds, device)
        size = features.nbytes + attention.nbytes
        ratios = [peak_bytes(calls[name], device) / size for name in ("AdaTA", "AdaTA compiled")]
        row = [f"{side**2} x {images}", f"{size / 1e6:.0f}", *(f"{ratio:.2f}" for ratio in ratios)]
        memory.append([*row, f"≤ {MEMORY}", verdict(max(ratios) <= MEMORY)])
    qualities = quality(2 if options.quick else 24, 14, options.width)
    preface = PREFACE.format(
        arguments="".join(f" --{name}" for name in ("quick",) if options.quick),
        machine=machine(device),
        sklearn=sklearn.__version__,
        python=platform.python_version(),
        width=options.width,
        rounds=options.rounds,
        few=" (5 at 4096 patches)" if 64 in sides and options.rounds > 5 else "",
        clusters=CLUSTERS,
        kept=KEPT,
    )
    print(preface, report(results, memory, qualities, *host_reads_and_graph_breaks()), sep="\n\n")


if __name__ == "__main__":
    main()
