"""Does the cluster that carried an answer show the thing that was asked for?

    python -m studies.small.why --model build/granulon-small

New scenes with true masks; questions for the thing at a place. The answer's own cluster is the one that shares most
patches with the thing (intersection over union), at the controller's level. `model.evidence` ranks the clusters by
what the answer loses without them.
"""

import argparse

import numpy as np
import torch
from tqdm import tqdm

from granulon.hub.answer import ask
from granulon.hub.inference import load_model, load_processor
from granulon.hub.text import markdown_table
from granulon.train.data.cutouts import PATCH, SIDE, compose, questions

from .measure import right, share

KIND = "place"


def patch_share(mask: np.ndarray, number: int) -> np.ndarray:
    """Which patches mostly show a thing, (H,W) bool."""
    tiles = (mask == number).reshape(SIDE // PATCH, PATCH, -1, PATCH)
    return tiles.mean((1, 3)) > 0.5


def own_cluster(cluster_map: np.ndarray, thing_HW: np.ndarray) -> int:
    """The cluster with the largest intersection over union with a thing, from 0."""
    overlaps = [
        ((cluster_map == cluster) & thing_HW).sum() / ((cluster_map == cluster) | thing_HW).sum()
        for cluster in range(cluster_map.max() + 1)
    ]
    return int(np.argmax(overlaps))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/granulon-small")
    parser.add_argument("--questions", type=int, default=200)
    options = parser.parse_args()
    model = load_model(options.model)
    processor = load_processor(options.model, model.config)
    model.generation_config.do_sample = False
    rows, answers, ranks, sizes, seed = [], [], [], [], 0
    with tqdm(total=options.questions) as progress:
        while len(rows) < options.questions:
            scene = compose(f"why {seed}")
            asked = next((q for q in questions(scene, f"why {seed}") if q.kind == KIND), None)
            seed += 1
            if asked is None:
                continue
            number = 1 + next(n for n, thing in enumerate(scene.things) if thing.name == asked.answer)
            thing_HW = patch_share(scene.mask, number)
            if not thing_HW.any():
                continue
            torch.manual_seed(0)
            found = ask(model, processor, scene.picture, asked.text, max_new_tokens=12, why=True)
            order = [entry["number"] - 1 for entry in found["clusters"]]
            ranks.append(order.index(own_cluster(found["cluster_map"], thing_HW)))
            rows.append({"answer": asked.answer})
            answers.append(found["answer"])
            sizes.append(len(order))
            progress.update()
    right_N, rank_N, size_N = right(rows, answers), np.array(ranks), np.array(sizes)
    lines = []
    for name, chosen in (("all", np.ones(len(rows), bool)), ("right answers", right_N > 0), ("wrong", right_N == 0)):
        chance = (2 / size_N[chosen]).mean() if chosen.any() else float("nan")
        first, two = (share((rank_N[chosen] < most).astype(float)) for most in (1, 2))
        lines.append([name, int(chosen.sum()), first, two, f"{chance:.2f}"])
    print(markdown_table(["questions", "n", "first", "among the first two", "chance of two"], lines))
    print(f"\nRight: {share(right_N)}; {size_N.mean():.1f} clusters.")


if __name__ == "__main__":
    main()
