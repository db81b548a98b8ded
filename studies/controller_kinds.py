"""Which decoder layers and which descriptor let a controller read kinds of question that it never saw?

    python studies/controller_kinds.py --text build/parts/smollm2-135m-instruct

Two measurements on the seed corpus, both with 95% intervals of a bootstrap over kinds (phrasings where those are new):
six-fold cross-validation over the kinds of the train split, on which choices may rest, and the test splits, which are
looked at for the answer. Prints Markdown.

Shapes: Q distinct questions, T question tokens, E text width, G levels.
"""

import argparse
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from granulon.train.controller.corpus import TEST, TRAIN
from granulon.train.controller.fit import Labelled, bag_of_words, bootstrap_group, controller_logits, fit
from granulon.train.controller.level_scores import mean_interval, scores
from granulon.train.controller.templates import KINDS, LEVELS, TEST_SPLITS, seed_corpus
from modeling_granulon import GranularityController
from modeling_granulon.granularity_controller import question_states

FOLDS = 6
LEARNING_RATE, WIDTH = 3e-4, 256  # of granulon-train-controller and of the configuration
OTHER_SETTINGS = ((1e-4, 256), (1e-3, 256), (3e-4, 32), (3e-4, 64), (3e-4, 512))


def _mean(states_BTE, mask_BT):
    weights_BT1 = mask_BT.unsqueeze(-1).float()
    return (states_BTE.float() * weights_BT1).sum(1) / weights_BT1.sum(1)


def _last(states_BTE, mask_BT):
    return states_BTE[torch.arange(len(mask_BT)), mask_BT.sum(1) - 1].float()


def _normed(pool: Callable) -> Callable:
    return lambda states, mask: nn.functional.layer_norm(pool(states, mask), states.shape[-1:])


# name: what becomes of (B,T,E) states, and whether each feature is then standardised over the training questions
DESCRIPTORS = {
    "mean of standardised states (ours)": (lambda states, mask: GranularityController.pool(None, states, mask), False),
    "mean of states": (_mean, False),
    "standardised mean of states": (_normed(_mean), False),
    "mean of states, each feature standardised": (_mean, True),
    "ours, each feature standardised": (lambda states, mask: GranularityController.pool(None, states, mask), True),
    "standardised state of the last token": (_normed(_last), False),
}
OURS = next(iter(DESCRIPTORS))


@torch.no_grad()
def descriptors(folder: str, questions: list[str], layers: list[int], dtype: torch.dtype) -> dict:
    """(layer, descriptor) to (Q,E) fp32."""
    tokenizer, decoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=dtype).eval()
    order = sorted(range(len(questions)), key=lambda place: len(questions[place]))
    found = {}
    for start in range(0, len(order), 64):
        batch = [questions[place] for place in order[start : start + 64]]
        inputs = tokenizer(batch, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
        for layer in layers:
            states_BTE = question_states(decoder, inputs.input_ids, inputs.attention_mask, layer)
            for name, (pool, _) in DESCRIPTORS.items():
                found.setdefault((layer, name), []).append(pool(states_BTE, inputs.attention_mask))
    back = torch.tensor(order).argsort()
    return {key: torch.cat(parts)[back] for key, parts in found.items()}


def controller_probs(
    pooled_QE: torch.Tensor, data: Labelled, by_feature: bool = False, lr: float = LEARNING_RATE, width: int = WIDTH
) -> torch.Tensor:
    """Probabilities (Q,G) of a controller trained on the train split."""
    if by_feature:
        trained_QE = pooled_QE[data.question_B[data.places(TRAIN)].unique()]
        pooled_QE = (pooled_QE - trained_QE.mean(0)) / (trained_QE.std(0) + 1e-6)
    torch.manual_seed(0)
    controller = GranularityController(pooled_QE.shape[1], width, len(LEVELS), "gelu")
    fit(controller, pooled_QE, data, lr=lr)
    with torch.no_grad():
        return controller_logits(controller, pooled_QE).softmax(-1)


def folds(rows: list[dict], kinds_per_level: int | None = None) -> list[list[dict]]:
    """The rows of the train split's kinds, FOLDS times, each time with other kinds as "test_kinds"."""
    known = {
        level: [kind.name for kind in KINDS if kind.level == level and TRAIN in kind.templates] for level in LEVELS
    }
    rows = [row for row in rows if row["split"] != "test_kinds"]
    made = []
    for fold in range(FOLDS):
        held_out = {name for names in known.values() for name in names[fold::FOLDS]}
        rest = ([name for name in names if name not in held_out][:kinds_per_level] for names in known.values())
        kept = {name for names in rest for name in names}
        made.append([row | {"split": "test_kinds"} for row in rows if row["kind"] in held_out])
        made[-1] += [row for row in rows if row["kind"] in kept and not row["split"].startswith(TEST)]
    return made


def cross_validated(
    predict: Callable, rows: list[dict], place: dict[str, int], kinds_per_level: int | None = None
) -> str:
    """Accuracy on held-out kinds; `predict` gives (Q,G) of a fold's data and the places of its questions."""
    right, kinds = [], []
    for part in folds(rows, kinds_per_level):
        data = Labelled.of(part, list(LEVELS), soft=False)
        probs_QG = predict(data, torch.tensor([place[question] for question in data.questions]))
        tested_B = data.places("test_kinds")
        right.append((probs_QG[data.question_B[tested_B]].argmax(-1) == data.level_B[tested_B]).double())
        kinds += [data.rows[number]["kind"] for number in tested_B.tolist()]
    return interval(mean_interval(torch.cat(right).numpy(), kinds))


def interval(value: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*value)


def test_scores(probs_QG: torch.Tensor, data: Labelled) -> list[str]:
    cells = []
    for split in TEST_SPLITS:
        places_B = data.places(split)
        groups = [bootstrap_group(data.rows[number], split) for number in places_B.tolist()]
        probs_BG = probs_QG[data.question_B[places_B]].numpy()
        cells.append(interval(scores(probs_BG, data.level_B[places_B].numpy(), groups)["accuracy"]))
    return cells


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", required=True, help="language model: a folder, or a repository of the Hub")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 6, 12, 20])
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    rows = seed_corpus()
    data = Labelled.of(rows, list(LEVELS), soft=False)
    place = {question: number for number, question in enumerate(data.questions)}
    pooled = descriptors(arguments.text, data.questions, arguments.layers, getattr(torch, arguments.dtype))

    print("| layer | descriptor | kinds, cross-validated |\n|--:|---|--:|")
    for layer, name in pooled:
        by_feature = DESCRIPTORS[name][1]
        cell = cross_validated(
            lambda part, own_Q, key=(layer, name), by=by_feature: controller_probs(pooled[key][own_Q], part, by),
            rows, place,
        )  # fmt: skip
        print(f"| {layer} | {name} | {cell} |", flush=True)
    print(f"| | bag of words | {cross_validated(lambda part, _: bag_of_words(part), rows, place)} |")

    print("\n| learning rate | width | kinds, cross-validated |\n|--:|--:|--:|")
    first = pooled[arguments.layers[0], OURS]
    for lr, width in OTHER_SETTINGS:
        cell = cross_validated(
            lambda part, own_Q, lr=lr, width=width: controller_probs(first[own_Q], part, lr=lr, width=width),
            rows, place,
        )  # fmt: skip
        print(f"| {lr} | {width} | {cell} |", flush=True)

    print("\n| kinds a level | layer | kinds, cross-validated |\n|--:|--:|--:|")
    for count in (2, 4, 8, 12, 18):
        for layer in dict.fromkeys((arguments.layers[0], arguments.layers[-1])):
            cell = cross_validated(
                lambda part, own_Q, key=(layer, OURS): controller_probs(pooled[key][own_Q], part),
                rows, place, count,
            )  # fmt: skip
            print(f"| {count} | {layer} | {cell} |", flush=True)

    print(f"\n| layer | {' | '.join(TEST_SPLITS)} |\n|--:|--:|--:|--:|")
    for layer in arguments.layers:
        cells = test_scores(controller_probs(pooled[layer, OURS], data), data)
        print(f"| {layer} | {' | '.join(cells)} |", flush=True)
    print(f"| bag of words | {' | '.join(test_scores(bag_of_words(data), data))} |")
    print(f"| chance | {' | '.join(['0.333'] * 3)} |")


if __name__ == "__main__":
    main()
