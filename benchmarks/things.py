"""Do tokens follow things? Scenes of photographed things with true masks, seen by DINOv2-small.

    python benchmarks/things.py --tune > benchmarks/results/things.md     # without --tune, held-out things alone
    python benchmarks/things.py --figure docs/clusters-photographs.png    # photographs and their clusters

A scene is a ground (a photograph, a texture or smooth noise) with one to four stamps pasted onto it; their
transparency is the true mask. A thing is found if the patches of one token have an intersection over union above .5
with the patches that show it. The stamps are split by name into two halves: settings are chosen on one and reported on
the other. Needs the parts that `make parts` fetches; features are kept below build/things. Progress goes to stderr.

Shapes by suffix: S scenes, N patches, K tokens, T things of a scene, L image side.
"""

import argparse
import hashlib
import math
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from baselines import authors_kmeans, dpc_knn
from PIL import Image
from settings import command_line
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from granulon.evaluation.statistics import interval
from granulon.evaluation.token_reduction import grid_cells, tome, visionzip
from granulon.hub.text import markdown_table, with_interval
from granulon.hub.visualize import overlay_clusters
from modeling_granulon import AdaptiveTokenAggregation
from modeling_granulon.adaptive_token_aggregation import fold, quality_terms
from modeling_granulon.configuration_granulon import DEFAULT_GRANULARITIES
from modeling_granulon.vision_features import COLUMN_STRIDE, vision_features

ROOT = Path(__file__).parents[1]
STAMPS = ROOT / "build/parts/tuxpaint-stamps/usr/share/tuxpaint/stamps"
ENCODER = ROOT / "build/parts/dinov2-small"
CACHE = ROOT / "build/things"
PHOTOGRAPHS = (
    "astronaut.png brick.png chelsea.png coffee.png grass.png gravel.png hubble_deep_field.jpg motorcycle_left.png "
    "rocket.jpg"
).split()
SCENES = {224: 240, 448: 80}  # image side: scenes of each half
THINGS = 4  # in a scene, at most
PATCH = 14
FEWEST_PATCHES = 4  # a thing that fewer patches show is not pasted, nor anything that would hide more than half of one

LEVELS, STRIDES, CLUSTERS, KEPT = (
    tuple(level[key] for level in DEFAULT_GRANULARITIES) for key in ("name", "stride", "clusters", "keep")
)
GOALS = (1.10, 1.10, 1.00)  # things found over those of k-means on patches, level by level
BASELINE = "k-means on patches"
THERE, FOUND, IOU, KEPT_SHARE = range(4)  # columns of `sums_by_scene`
PREFACE = """\
# Do tokens follow things?

`{command}`: {scenes},
of {stamps} photographed stamps held out from the search for the defaults ({tuning} others served it); DINOv2-small,
14-pixel patches. A thing is *found* if the patches of one token have IoU > .5 with the patches that show it (more than
half covered). "Kept" is the share of the things' patches that any token stands for; methods that merge keep all. In
brackets 95% bootstrap intervals over scenes. Every method gives as many tokens at a level.
k-means on patches is scikit-learn's on features of unit length, best of 4 restarts. The defaults of AdaTA: strides
{strides}, clusters {clusters}, kept {kept}; λ_f 3; η (1, 1, 1); 2 rounds on cells, 3 on patches; columns of
attention summed over 4 x 4 patches.

The scenes are composed: photographs or noise with stamps pasted on them. The weights of DINOv3 were not
available, so its defaults are those of DINOv2.
"""


@cache
def stamps(half: str) -> list[Path]:
    """Photographed things: transparent ground, at least 60 pixels, a text beside, no symbols or cartoons."""
    chosen = []
    for path in sorted(STAMPS.rglob("*.png")):
        name = path.relative_to(STAMPS).as_posix()
        if name.startswith("symbols/") or "cartoon" in name or not path.with_suffix(".txt").exists():
            continue
        with Image.open(path) as picture:
            usable = picture.mode in ("RGBA", "LA") and min(picture.size) >= 60
        even = hashlib.sha256(name.encode()).digest()[0] % 2 == 0
        if usable and even == (half == "tuning"):
            chosen.append(path)
    return chosen


@cache
def photographs() -> list[np.ndarray]:
    """The photographs of scikit-image, RGB."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    return [np.asarray(Image.open(folder / name).convert("RGB")) for name in PHOTOGRAPHS]


def ground(random: np.random.Generator, side: int) -> Image.Image:
    """A crop of a photograph or, one time in four, smooth noise in colour."""
    if random.random() < 0.25:
        waves = random.integers(3, 12)
        noise = Image.fromarray(random.integers(40, 216, (waves, waves, 3), dtype=np.uint8))
        return noise.resize((side, side), Image.Resampling.BICUBIC)
    photograph = photographs()[random.integers(len(photographs()))]
    size = int(min(photograph.shape[:2]) * random.uniform(0.5, 1))
    top, left = (random.integers(length - size + 1) for length in photograph.shape[:2])
    crop = Image.fromarray(photograph[top : top + size, left : left + size])
    return crop.resize((side, side), Image.Resampling.BICUBIC)


def scene(random: np.random.Generator, side: int, names: list[Path]) -> tuple[Image.Image, np.ndarray]:
    """A picture and what each of its patches shows (H,W): 0 for the ground, t for the t-th thing."""
    picture, pixels_LL = ground(random, side), np.zeros((side, side), int)
    patches_HW = np.zeros((side // PATCH, side // PATCH), int)
    wanted, pasted = int(random.integers(1, THINGS + 1)), 0
    for _ in range(20):
        thing = Image.open(names[random.integers(len(names))]).convert("RGBA")
        thing = thing.crop(thing.getchannel("A").getbbox())
        scale = side * math.exp(random.uniform(math.log(0.15), math.log(0.6))) / max(thing.size)
        thing = thing.resize([max(1, round(scale * length)) for length in thing.size], Image.Resampling.LANCZOS)
        left, top = (int(random.integers(max(1, side - length + 1))) for length in thing.size)
        mask = Image.new("L", (side, side))
        mask.paste(thing.getchannel("A"), (left, top))
        pixels = np.where(np.asarray(mask) > 127, pasted + 1, pixels_LL)
        patches = majority(pixels)
        areas = [((patches == t).sum(), (patches_HW == t).sum()) for t in range(1, pasted + 2)]
        if all(area >= max(FEWEST_PATCHES, before / 2) for area, before in areas):
            picture.paste(thing, (left, top), thing)
            pixels_LL, patches_HW, pasted = pixels, patches, pasted + 1
        if pasted == wanted:
            break
    return picture, patches_HW


def majority(pixels_LL: np.ndarray) -> np.ndarray:
    """The thing that covers more than half of each patch (H,W), else 0."""
    tiles = pixels_LL.reshape(len(pixels_LL) // PATCH, PATCH, -1, PATCH)
    shares_TNN = np.stack([(tiles == thing).mean((1, 3)) for thing in range(THINGS + 1)])
    return np.where(shares_TNN[1:].max(0) > 0.5, shares_TNN[1:].argmax(0) + 1, 0)


@dataclass
class Seen:
    """features (S,N,D) and attention (S,N,N) of scenes, both in fp32, and the thing that each patch shows (S,N)."""

    features: Tensor
    attention: Tensor
    things: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        return (math.isqrt(self.things.shape[1]),) * 2


def see(half: str, side: int) -> Seen:
    """The scenes of a half through DINOv2-small; kept for the next time."""
    path = CACHE / f"{half}-{side}-{SCENES[side]}.pt"
    if not path.exists():
        pictures, things = zip(*scenes(half, side), strict=True)
        features, attention = encode(list(pictures))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"features": features, "attention": attention.half(), "things": torch.stack(things)}, path)
    kept = torch.load(path)
    return Seen(kept["features"], kept["attention"].float(), kept["things"])


def scenes(half: str, side: int) -> list[tuple[Image.Image, Tensor]]:
    """The scenes of a half: pictures, and what each patch shows (N,)."""
    random = np.random.default_rng([side, half == "tuning"])
    drawn = (scene(random, side, stamps(half)) for _ in range(SCENES[side]))
    return [(picture, torch.from_numpy(patches).flatten()) for picture, patches in drawn]


@torch.no_grad()
def encode(pictures: list[Image.Image], batch: int = 8) -> tuple[Tensor, Tensor]:
    """Features (S,N,D) and attention (S,N,N) of pictures from DINOv2-small."""
    from transformers import AutoModel

    tower = AutoModel.from_pretrained(ENCODER).eval()
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    features, attention = [], []
    for start in tqdm(range(0, len(pictures), batch), desc="DINOv2-small"):
        pixels = [torch.from_numpy(np.array(x)).permute(2, 0, 1) / 255 for x in pictures[start : start + batch]]
        seen = vision_features(tower, (torch.stack(pixels) - mean) / std)
        features.append(seen.features)
        attention.append(seen.relation.profiles())
    return torch.cat(features), torch.cat(attention)


def overlaps(label_SN: Tensor, things_SN: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each thing (S,T): best IoU with a token's patches, share of its patches with a token, whether it is there."""
    token_SKN = (label_SN[:, None] == torch.arange(tokens)[:, None]).float()
    thing_STN = (things_SN[:, None] == torch.arange(1, THINGS + 1)[:, None]).float()
    both_STK = thing_STN @ token_SKN.mT
    either_STK = thing_STN.sum(-1)[..., None] + token_SKN.sum(-1)[:, None] - both_STK
    share_ST = both_STK.sum(-1) / thing_STN.sum(-1).clamp_min(1)
    return (both_STK / either_STK.clamp_min(1)).amax(-1), share_ST, thing_STN.any(-1)


def sums_by_scene(label_SN: Tensor, things_SN: Tensor, tokens: int) -> np.ndarray:
    """(S,4): things, things found, sum of best IoU, sum of shares kept."""
    iou_ST, share_ST, there_ST = overlaps(label_SN, things_SN, tokens)
    parts = (torch.ones_like(iou_ST), (iou_ST > 0.5).float(), iou_ST, share_ST)
    return torch.stack([(part * there_ST).sum(1) for part in parts], dim=1).double().numpy()


@dataclass(frozen=True)
class Settings:
    """Of AdaTA: strides and clusters by level, sums of attention's columns, arguments that are not the defaults."""

    strides: tuple[int, ...] = STRIDES
    clusters: tuple[int, ...] = CLUSTERS
    column_stride: int = COLUMN_STRIDE
    arguments: tuple[tuple[str, object], ...] = ()

    def labels(self, seen: Seen, level: int, batch: int = 20) -> Tensor:
        """The token of each patch (S,N) at a level."""
        aggregate = AdaptiveTokenAggregation(**dict(self.arguments))
        stride, clusters, kept = self.strides[level], self.clusters[level], KEPT[level]
        found = []
        for part in torch.arange(len(seen.things)).split(batch):
            profiles = sum_columns(seen.attention[part], seen.grid, self.column_stride)
            found.append(aggregate(seen.features[part], profiles, stride, clusters, seen.grid, kept).assignment)
        return torch.cat(found).flatten(1)


def sum_columns(attention: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """What `RelationMap.profiles(stride)` gives, from the whole map."""
    if stride == 1:
        return attention
    return F.avg_pool2d(attention.unflatten(2, grid), stride, ceil_mode=True, divisor_override=1).flatten(2)


def varied(**changes) -> Settings:
    """Settings with some values changed."""
    own = {name: changes.pop(name) for name in ("strides", "clusters", "column_stride") if name in changes}
    return Settings(arguments=tuple(changes.items()), **own)


VARIATIONS = {
    "the defaults": varied(),
    "strides 4, 2, 1": varied(strides=(4, 2, 1)),
    "strides 3, 3, 3": varied(strides=(3, 3, 3)),
    "strides 1, 1, 1": varied(strides=(1, 1, 1)),
    "λ_f 0": varied(relation_weight=0.0),
    "λ_f 0.1": varied(relation_weight=0.1),
    "λ_f 1": varied(relation_weight=1.0),
    "λ_f 2": varied(relation_weight=2.0),
    "λ_f 5": varied(relation_weight=5.0),
    "λ_f 10": varied(relation_weight=10.0),
    "columns not summed": varied(column_stride=1),
    "columns of 2 x 2": varied(column_stride=2),
    "columns of 8 x 8": varied(column_stride=8),
    "no rounds on cells": varied(iterations=0),
    "1 round on cells": varied(iterations=1),
    "4 rounds on cells": varied(iterations=4),
    "no rounds on patches": varied(refinement_iterations=0),
    "1 round on patches": varied(refinement_iterations=1),
    "2 rounds on patches": varied(refinement_iterations=2),
    "8 rounds on patches": varied(refinement_iterations=8),
    "no filter: clusters 5, 10, 20": varied(clusters=(5, 10, 20)),
    "clusters 7, 14, 28": varied(clusters=(7, 14, 28)),
    "clusters 10, 20, 40": varied(clusters=(10, 20, 40)),
    "η (1, 0, 0), size alone": varied(score_weights=(1.0, 0.0, 0.0)),
    "η (0, 1, 0), coherence alone": varied(score_weights=(0.0, 1.0, 0.0)),
    "η (0, 0, 1), dispersion alone": varied(score_weights=(0.0, 0.0, 1.0)),
    "η (0, 1, 1)": varied(score_weights=(0.0, 1.0, 1.0)),
    "η (1, 1, 0)": varied(score_weights=(1.0, 1.0, 0.0)),
}


def kmeans_on_patches(seen: Seen, tokens: int) -> Tensor:
    """scikit-learn's k-means on features of unit length (S,N)."""
    unit_SND = F.normalize(seen.features, dim=-1).numpy()
    fits = (KMeans(tokens, n_init=4, random_state=0).fit(unit) for unit in tqdm(unit_SND, desc="k-means", leave=False))
    return torch.stack([torch.from_numpy(fit.labels_).long() for fit in fits])


def all_methods(seen: Seen, level: int) -> dict[str, Tensor]:
    """The token of each patch (S,N) by every method."""
    kept = KEPT[level]
    return {
        "AdaTA": VARIATIONS["the defaults"].labels(seen, level),
        BASELINE: kmeans_on_patches(seen, kept),
        "authors' k-means": torch.stack(authors_kmeans(seen.features, kept)[1]),
        "grid cells": grid_cells(seen.features, kept, seen.grid)[1],
        "ToMe": tome(seen.features, kept)[1],
        "VisionZip": visionzip(seen.features, seen.attention, kept)[1],
        "DPC-KNN": dpc_knn(seen.features, kept)[1],
    }


def bootstrap(value, sums: np.ndarray) -> str:
    """A function of sums over scenes and its 95% bootstrap interval."""
    return with_interval(value(sums.sum(0, keepdims=True))[0], *interval(value, sums))


def share(column: int):
    """A column of sums over scenes, per thing."""
    return lambda sums_RS: sums_RS[:, column] / sums_RS[:, THERE]


def ratio(ours: np.ndarray, theirs: np.ndarray, column: int) -> tuple[str, float]:
    """Ours over theirs on the same scenes, as text and as a number."""
    both = np.stack([ours[:, column], theirs[:, column]], axis=1)

    def value(sums_R2):
        return sums_R2[:, 0] / sums_R2[:, 1]

    return bootstrap(value, both), float(value(both.sum(0, keepdims=True))[0])


def method_table(side: int, sums: dict[str, list[np.ndarray]]) -> str:
    """Rows of methods, at each level: found, best IoU, share kept."""
    header = [f"{side} px"]
    for name, kept in zip(LEVELS, KEPT, strict=True):
        header += [f"{name}, {kept} tokens: found", "best IoU", "kept"]
    rows = []
    for method, levels in sums.items():
        row = [method]
        for part in levels:
            row += [bootstrap(share(FOUND), part), bootstrap(share(IOU), part)]
            row.append(f"{share(KEPT_SHARE)(part.sum(0, keepdims=True))[0]:.3f}")
        rows.append(row)
    return markdown_table(header, rows)


def ratio_table(sums: dict[int, dict[str, list[np.ndarray]]]) -> str:
    """AdaTA over k-means on patches, by level and image side."""
    rows = []
    for level, (name, goal) in enumerate(zip(LEVELS, GOALS, strict=True)):
        for side in (*sums, None):
            sides = [side] if side else list(sums)
            ours, theirs = (np.concatenate([sums[s][m][level] for s in sides]) for m in ("AdaTA", BASELINE))
            found, number = ratio(ours, theirs, FOUND)
            kept = share(KEPT_SHARE)(ours.sum(0, keepdims=True))[0]
            met = "met" if number >= goal and kept >= 0.99 else "**not met**"
            size = f"{side} px" if side else "both"
            rows.append([f"{name}, {size}", found, ratio(ours, theirs, IOU)[0], f"{kept:.3f}", f"≥ {goal:.2f}", met])
    return markdown_table(["AdaTA over k-means on patches", "found", "best IoU", "kept", "goal for found", ""], rows)


def effect_table(half: dict[int, Seen], baseline: dict[int, list[np.ndarray]]) -> str:
    """Things found and best IoU of each variation over those of k-means on patches, both sizes together."""
    rows = []
    for name, settings in tqdm(VARIATIONS.items(), desc="variations"):
        row = [name]
        for level in range(len(LEVELS)):
            pairs = [
                (sums_by_scene(settings.labels(seen, level), seen.things, KEPT[level]), baseline[side][level])
                for side, seen in half.items()
            ]
            ours, theirs = (np.concatenate(part) for part in zip(*pairs, strict=True))
            row += [ratio(ours, theirs, FOUND)[0], f"{ratio(ours, theirs, IOU)[1]:.3f}"]
        rows.append(row)
    header = ["what differs from the defaults"]
    for name in LEVELS:
        header += [f"{name}: found", "best IoU"]
    return markdown_table(header, rows)


def term_table(half: dict[int, Seen]) -> str:
    """How the parts of Eq. 6 vary over the clusters of all scenes before the filter, and how they go together."""
    rows = []
    for level, name in enumerate(LEVELS):
        terms = []
        for seen in half.values():
            aggregate, folded = AdaptiveTokenAggregation(), fold(seen.features)
            profiles = sum_columns(seen.attention, seen.grid, COLUMN_STRIDE)
            points, cells = (aggregate._points(folded, profiles, seen.grid, s) for s in (1, STRIDES[level]))
            groups, centers = aggregate._cluster(cells, points, CLUSTERS[level])
            terms.append(torch.stack([x.flatten() for x in quality_terms(groups, points, centers, seen.grid)]))
        terms = torch.cat(terms, dim=1)
        quantiles = terms.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=1).T
        pairs = terms.corrcoef()
        rows.append(
            [name]
            + [" / ".join(f"{value:.2f}" for value in row) for row in quantiles]
            + [f"{pairs[i, j]:.2f}" for i, j in ((0, 1), (0, 2), (1, 2))]
        )
    header = ["level", "size", "coherence", "dispersion", "size-coherence", "size-dispersion", "coherence-dispersion"]
    return markdown_table(header, rows)


def measure(half: dict[int, Seen]) -> dict[int, dict[str, list[np.ndarray]]]:
    """Sums by scene of every method at every level, by image side."""
    sums = {}
    for side, seen in half.items():
        levels = [all_methods(seen, level) for level in range(len(LEVELS))]
        sums[side] = {
            method: [sums_by_scene(levels[i][method], seen.things, KEPT[i]) for i in range(len(LEVELS))]
            for method in levels[0]
        }
    return sums


def figure(tile: int = 232, gap: int = 6) -> Image.Image:
    """Photographs, each beside its clusters at every level. No stamps, which are under the GPL."""
    pictures = []
    for name in ("chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg"):
        photograph = photographs()[PHOTOGRAPHS.index(name)]
        size = min(photograph.shape[:2])
        left = (photograph.shape[1] - size) // 2
        pictures.append(Image.fromarray(photograph[:size, left : left + size]).resize((448, 448)))
    features, attention = encode(pictures)
    seen = Seen(features, attention, torch.zeros(features.shape[:2]))
    labels = [VARIATIONS["the defaults"].labels(seen, level).unflatten(1, seen.grid) for level in range(len(LEVELS))]
    sheet = Image.new("RGB", (4 * (tile + gap) - gap, len(pictures) * (tile + gap) - gap), "white")
    for row, picture in enumerate(pictures):
        columns = [picture, *(overlay_clusters(picture, level[row].numpy()) for level in labels)]
        for column, shown in enumerate(columns):
            shown = shown.resize((tile, tile), Image.Resampling.LANCZOS)
            sheet.paste(shown, (column * (tile + gap), row * (tile + gap)))
    return sheet.quantize(256, dither=Image.Dither.NONE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="print the search on the tuning half too")
    parser.add_argument("--figure", type=Path, help="write a figure of clusters here, and measure nothing")
    options = parser.parse_args()
    missing = [str(path.relative_to(ROOT)) for path in (STAMPS, ENCODER) if not path.exists()]
    if missing:
        sys.exit(f"{' and '.join(missing)} not found; `make parts` fetches them")
    torch.set_grad_enabled(False)
    if options.figure:
        figure().save(options.figure, optimize=True)
        return
    held_out = {side: see("held-out", side) for side in SCENES}
    sums = measure(held_out)
    counts = {side: int(sums[side]["AdaTA"][0][:, THERE].sum()) for side in SCENES}
    lines = [
        PREFACE.format(
            command=command_line(),
            stamps=len(stamps("held-out")),
            tuning=len(stamps("tuning")),
            strides=STRIDES,
            clusters=CLUSTERS,
            kept=KEPT,
            scenes=" and ".join(f"{SCENES[side]} scenes of {counts[side]} things at {side} px" for side in SCENES),
        ),
        "## Held-out things\n",
        *(method_table(side, sums[side]) + "\n" for side in SCENES),
        ratio_table(sums) + "\n",
        "## What each setting does, on held-out things\n",
        "Found and best IoU over those of k-means on patches with as many tokens, both sizes together.\n",
        effect_table(held_out, {side: sums[side][BASELINE] for side in SCENES}) + "\n",
        "## The parts of Eq. 6 on held-out scenes\n",
        "10th, 50th and 90th percentile over all clusters before the filter, and correlations.\n",
        term_table(held_out),
    ]
    if options.tune:
        tuning = {side: see("tuning", side) for side in SCENES}
        baseline = {
            side: [sums_by_scene(kmeans_on_patches(seen, kept), seen.things, kept) for kept in KEPT]
            for side, seen in tuning.items()
        }
        lines += [
            "\n## The same settings on the tuning half, where the defaults were chosen\n",
            effect_table(tuning, baseline),
        ]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
