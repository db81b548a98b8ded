"""AdaTA against other methods of token reduction: time alone and to the first token, inertia, memory.

    python benchmarks/aggregation.py > benchmarks/results/aggregation.md

Whether tokens follow things at these settings is measured in things.py; the other methods are in baselines.py.
Progress goes to stderr.
"""

import os
import platform
from functools import partial

import baselines
import numpy as np
import sklearn
import torch
from inference import text_parts, visual_parts
from settings import PATCH, SHAPES, build, command_line, parse, parser
from sklearn.cluster import KMeans
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from granulon.evaluation.timing import interleaved, machine, peak_bytes, times, with_quartiles
from granulon.evaluation.token_reduction import tome, visionzip
from granulon.hub.text import markdown_table
from modeling_granulon import AdaptiveTokenAggregation
from modeling_granulon.configuration_granulon import DEFAULT_GRANULARITIES
from modeling_granulon.vision_features import COLUMN_STRIDE

STRIDE, CLUSTERS, KEPT = (DEFAULT_GRANULARITIES[-1][key] for key in ("stride", "clusters", "keep"))
GOALS = {196: 3, 576: 5, 784: 8, 1024: 8, 4096: 50}  # patches: how many times faster than the authors' k-means
AUTHORS, OURS = "authors", "AdaTA"
FASTER_THAN = ("ToMe", "DPC-KNN", "fast_pytorch_kmeans")
REST = ("tower", "projector", "prefill, semantic")  # of the way to the first token, for every method
MAP = "relation map"
MORE = {OURS: (MAP, "controller"), "VisionZip": (MAP,)}  # what else a method needs
MEMORY = 1.5
WIDTH = 1024  # of the features
FEW_ROUNDS = 5  # at 4096 patches
INERTIA = (5, 12, 20, 24)  # clusters
PREFACE = """\
# Aggregation

`{command}`: {machine}, scikit-learn {sklearn}, Python {python};
features of width {width} in float32, {clock}, medians and quartiles of {rounds} interleaved rounds{few}; ratios are
taken within a round. The load average was {load:.1f} before the run and {after:.1f} after it, this program included.

The settings are those of [things.md](things.md), where the quality on real features is: the fine level (stride
{stride}, {clusters} clusters, {kept} kept); two rounds on cells, three on patches. The features here are
drawn: smooth regions, slow waves and noise in every patch; the attention is the row-softmax of their cosines, its
columns summed over {column_stride} x {column_stride} patches, as the model gives it. "Authors" is the algorithm of the
published code: k-means on the rows of the N x N cosine matrix, random seeds, up to 100 rounds with a convergence check
on the host, one image at a time. "Floor" is one read of the features and the sums, one N x D x K product and one mean
over segments. "Compiled" is `torch.compile` with `fullgraph=True`; of the two k-means that stop when they converge,
authors' and fast_pytorch_kmeans, only a round can be compiled so, since a value is read after each. Where both sides
are compiled, each is the faster of its two forms.

"Whole" is the time of one image to the first token from its semantic tokens: tower, projector and prefill
({shapes}, random weights), the method's share of
its batch, for AdaTA also controller and relation map, for VisionZip the map."""


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


def methods(features: Tensor, attention: Tensor, side: int) -> dict:
    """Calls by name; those that end with "compiled" are."""
    torch.compiler.reset()
    compiled = partial(torch.compile, fullgraph=True, dynamic=False)
    aggregate = AdaptiveTokenAggregation()
    level = (sum_columns(attention, side), STRIDE, CLUSTERS, (side, side), KEPT)
    calls = {
        "floor": lambda: floor(features, level[0]),
    }
    for name, kmeans, one_round in (
        (AUTHORS, baselines.authors_kmeans, baselines.authors_kmeans_round),
        ("fast_pytorch_kmeans", baselines.fast_pytorch_kmeans, baselines.fast_pytorch_kmeans_round),
    ):
        calls[name] = partial(kmeans, features, CLUSTERS)
        calls[f"{name} compiled"] = partial(kmeans, features, CLUSTERS, compiled(one_round))
    for name, call, arguments in (
        (OURS, aggregate, (features, *level)),
        ("ToMe", tome, (features, KEPT)),
        ("DPC-KNN", baselines.dpc_knn, (features, CLUSTERS)),
        ("VisionZip", visionzip, (features, attention, KEPT)),
    ):
        calls[name] = partial(call, *arguments)
        calls[f"{name} compiled"] = partial(compiled(call), *arguments)
    return calls


def sum_columns(attention: Tensor, side: int) -> Tensor:
    """Attention (I,N,N) summed over columns as the model gives it."""
    map_INHW = attention.unflatten(2, (side, side))  # (I,N,N) -> (I,N,H,W)
    return F.avg_pool2d(map_INHW, COLUMN_STRIDE, ceil_mode=True, divisor_override=1).flatten(2)


def floor(features: Tensor, profiles: Tensor) -> tuple:
    """The least that a clustering must compute: a read, a product, a mean over segments."""
    images, patches, width = features.shape
    segment = torch.arange(images * patches, device=features.device) * CLUSTERS // patches
    sums = torch.zeros(images * CLUSTERS, width, device=features.device)
    return (
        (features.sum(), profiles.sum(), features @ features[:, :CLUSTERS].mT),
        sums.index_add_(0, segment, features.flatten(0, 1)) / (patches / CLUSTERS),
    )


class HostReads(TorchDispatchMode):
    """Counts the operations for which the host waits for a value."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in {"_local_scalar_dense", "nonzero", "equal", "unique2"}
        return func(*args, **(kwargs or {}))


def inertia(unit_IND: Tensor, label_IN: Tensor, clusters: int) -> Tensor:
    """Sum of squared distances to the cluster means (I,)."""
    member_IKN = (label_IN[:, None] == torch.arange(clusters)[:, None]).float()
    centers_IKD = member_IKN @ unit_IND / member_IKN.sum(-1, keepdim=True).clamp_min(1)
    return (unit_IND - member_IKN.mT @ centers_IKD).square().sum((1, 2))


def quality(images: int, side: int, width: int) -> list[list]:
    """Rows of mean inertia over that of scikit-learn's best of ten restarts, at lambda_f = 0."""
    kinds = [F.normalize(draw(images, side, width, seed=1), dim=-1) for draw in (drawn_features, photo_features)]
    aggregate = AdaptiveTokenAggregation()
    rows = []
    for clusters in INERTIA:
        ratios = []
        for unit_IND in kinds:
            result = aggregate(unit_IND, None, STRIDE, clusters, (side, side), clusters)
            best = [KMeans(clusters, n_init=10, random_state=0).fit(unit.numpy()).inertia_ for unit in unit_IND]
            reached_I = inertia(unit_IND, result.assignment.flatten(1), clusters)
            ratios.append((reached_I / torch.tensor(best)).mean().item())
        rows.append([f"{clusters} clusters", *(f"{ratio:.3f}" for ratio in ratios)])
    return rows


def host_reads_and_graph_breaks() -> tuple[int, int]:
    """Numbers of host reads and of graph breaks of AdaTA."""
    features = drawn_features(2, 14, 64)
    arguments = (features, cosine_attention(features), STRIDE, CLUSTERS, (14, 14), KEPT)
    aggregate = AdaptiveTokenAggregation()
    with HostReads() as reads:
        aggregate(*arguments)
    torch.compiler.reset()
    return reads.count, torch._dynamo.explain(aggregate)(*arguments).graph_break_count


def cosine_attention(features: Tensor) -> Tensor:
    """The row-softmax of cosines (I,N,N)."""
    unit = F.normalize(features, dim=-1)
    return (10 * unit @ unit.mT).softmax(-1)


def verdict(met: bool) -> str:
    """Whether a goal is met, in Markdown."""
    return "met" if met else "**not met**"


class Timing:
    """Seconds of every method and part in every round (R,), at one number of patches."""

    def __init__(self, patches: int, images: int, seconds: dict[str, np.ndarray]):
        self.patches, self.images, self.seconds = patches, images, seconds

    @property
    def name(self) -> str:
        return f"{self.patches} x {self.images}"

    def best(self, method: str) -> np.ndarray:
        """Of a method compiled or, where that is faster, as it is."""
        return min((self.seconds[name] for name in (method, f"{method} compiled")), key=np.median)

    def whole(self, method: str) -> np.ndarray:
        """From the pixels of one image to the first token."""
        rest = sum(self.seconds[part] for part in (*REST, *MORE.get(method, ())))
        return rest + self.best(method) / self.images


def speed_rows(timings: list[Timing]) -> list[list]:
    """Rows of the table of times against the authors' k-means."""
    rows = []
    for timing in timings:
        seconds, goal = timing.seconds, GOALS[timing.patches]
        names = (AUTHORS, f"{AUTHORS} compiled", OURS, f"{OURS} compiled", "floor")
        eager, compiled = seconds[AUTHORS] / seconds[OURS], timing.best(AUTHORS) / timing.best(OURS)
        met = np.median(compiled) >= goal and np.median(eager) >= 1
        shares = (timing.best(method) / timing.images / timing.whole(method) for method in (AUTHORS, OURS))
        row = [timing.name, *(with_quartiles(seconds[name]) for name in names)]
        row += [with_quartiles(ratio, times) for ratio in (eager, compiled)]
        row += [*(f"{np.median(share):.2%}" for share in shares)]
        row += [with_quartiles(timing.whole(AUTHORS) / timing.whole(OURS), times)]
        rows.append([*row, f"≥ {goal}x, eager ≥ 1x", verdict(met)])
    return rows


def share_rows(timings: list[Timing]) -> list[list]:
    """Time of AdaTA over that of each other method, both compiled, alone and to the first token."""
    rows = []
    for method in (*FASTER_THAN, "VisionZip"):
        alone = [timing.best(OURS) / timing.best(method) for timing in timings]
        whole = [timing.whole(OURS) / timing.whole(method) for timing in timings]
        met = verdict(max(np.median(ratio) for ratio in alone) < 1)
        goal = ["< 1", met] if method in FASTER_THAN else ["none", ""]
        rows.append([method, *(with_quartiles(ratio, times) for ratio in alone), *goal])
        rows.append([f"{method}, whole", *(with_quartiles(ratio, times) for ratio in whole), "none", ""])
    return rows


def report(timings: list[Timing], memory: list[list], qualities: list[list], reads: int, breaks: int) -> str:
    """All tables as Markdown."""
    header = ["patches x images", "authors ms", "compiled ms", "AdaTA ms", "compiled ms", "floor ms"]
    header += ["authors / AdaTA", "both compiled", "authors, of the whole", "AdaTA, of the whole"]
    lines = [
        "## Against the authors' k-means\n",
        markdown_table([*header, "whole, authors / AdaTA", "goal", ""], speed_rows(timings)),
        "\n## Against other methods: time of AdaTA over theirs, both compiled\n",
        markdown_table(["method", *(timing.name for timing in timings), "goal", ""], share_rows(timings)),
        "\n## Inertia over that of scikit-learn's best of ten restarts, attention left out\n",
        "No goal; things.md has what the tokens find.\n",
        markdown_table(["", "drawn features", "photographs through random filters"], qualities),
        "\n## Memory: the most that is held beyond the arguments, over the bytes of features and sums\n",
        markdown_table(["patches x images", "features and sums MB", "eager", "compiled", "goal", ""], memory),
        f"\nHost reads: {reads} (goal 0). Graph breaks: {breaks} (goal 0).",
    ]
    return "\n".join(lines)


def rest_of_the_way(head, side: int) -> dict:
    """The other parts of the way to the first token, for one image."""
    calls = visual_parts(head, side * PATCH) | text_parts(head, side * PATCH, ["semantic"])[0]
    return {name: calls[name] for name in (*REST, *MORE[OURS])}


def measure(side: int, images: int, head, options) -> tuple[Timing, list]:
    """Seconds of each method on drawn features and of the rest, and the row of the table of memory."""
    features = drawn_features(images, side, WIDTH).to(options.device)
    attention = cosine_attention(features)
    calls = methods(features, attention, side)
    rounds = options.rounds if side < 64 else min(options.rounds, FEW_ROUNDS)
    seconds = interleaved(calls | rest_of_the_way(head, side), rounds, options.device, options.clock)
    size = features.nbytes + sum_columns(attention, side).nbytes
    ratios = [peak_bytes(calls[name], options.device) / size for name in (OURS, f"{OURS} compiled")]
    row = [f"{side**2} x {images}", f"{size / 1e6:.0f}", *(f"{ratio:.2f}" for ratio in ratios)]
    return Timing(side**2, images, seconds), [*row, f"≤ {MEMORY}", verdict(max(ratios) <= MEMORY)]


def main() -> None:
    options = parse(parser(__doc__, rounds=15))
    torch.set_grad_enabled(False)
    sides = {14: 8, 24: 8, 28: 8, 32: 8, 64: 1}  # images of each side
    if options.quick:
        options.rounds, sides = 3, {14: 2}
    shapes = "tiny" if options.quick else "large"
    head = build(shapes, options.device, options.dtype, SHAPES[shapes][2]["vocab_size"] - 1).eval()
    load = os.getloadavg()[0]
    timings, memory = zip(*(measure(side, images, head, options) for side, images in sides.items()))
    qualities = quality(2 if options.quick else 24, 14, WIDTH)
    preface = PREFACE.format(
        command=command_line(),
        machine=machine(options.device),
        sklearn=sklearn.__version__,
        python=platform.python_version(),
        width=WIDTH,
        rounds=options.rounds,
        few=f" ({FEW_ROUNDS} at 4096 patches)" if 64 in sides and options.rounds > FEW_ROUNDS else "",
        stride=STRIDE,
        clusters=CLUSTERS,
        kept=KEPT,
        column_stride=COLUMN_STRIDE,
        clock=options.clock_name,
        shapes=SHAPES[shapes][0],
        load=load,
        after=os.getloadavg()[0],
    )
    print(preface, report(timings, memory, qualities, *host_reads_and_graph_breaks()), sep="\n\n")


if __name__ == "__main__":
    main()
