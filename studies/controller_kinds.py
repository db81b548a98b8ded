"""How deep should a controller read to recognise kinds of question that it never saw?

    python studies/controller_kinds.py --text build/parts/smollm2-135m-instruct

On the seed corpus, by decoder layer and by number of kinds: six-fold cross-validation over the kinds of the train
split, on which choices may be based, and the test splits. Prints Markdown with 95% bootstrap intervals over kinds
(over phrasings where those are new).

Shapes: Q distinct questions, T question tokens, E text width, G levels.
"""

import argparse
from collections.abc import Callable

import torch
from transformers import AutoModel, AutoTokenizer

from granulon.hub.text import markdown_table, with_interval
from granulon.train.controller.corpus import TEST, TRAIN
from granulon.train.controller.fit import Labelled, bag_of_words, bootstrap_group, controller_logits, fit
from granulon.train.controller.level_scores import mean_interval, scores
from granulon.train.controller.templates import KINDS, LEVELS, TEST_SPLITS, seed_corpus
from modeling_granulon import GranularityController
from modeling_granulon.granularity_controller import question_states

FOLDS = 6
WIDTH = 256  # of the configuration


@torch.no_grad()
def pooled_states(folder: str, questions: list[str], layers: list[int], dtype: torch.dtype) -> dict[int, torch.Tensor]:
    """For each layer what a controller reads of each question, (Q,E) fp32."""
    tokenizer, decoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=dtype).eval()
    found = {layer: [] for layer in layers}
    for start in range(0, len(questions), 64):
        batch = questions[start : start + 64]
        inputs = tokenizer(batch, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
        for layer in layers:
            states_BTE = question_states(decoder, inputs.input_ids, inputs.attention_mask, layer)
            found[layer].append(GranularityController.pool(None, states_BTE, inputs.attention_mask))
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def controller_probs(pooled_QE: torch.Tensor, data: Labelled) -> torch.Tensor:
    """Probabilities (Q,G) of a controller trained on the train split."""
    torch.manual_seed(0)
    controller = GranularityController(pooled_QE.shape[1], WIDTH, len(LEVELS), "gelu")
    fit(controller, pooled_QE, data)
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


def cross_validated(predict: Callable, data: Labelled, kinds_per_level: int | None = None) -> str:
    """Accuracy on held-out kinds; `predict` gives (Q,G) for a fold's data and the indices of its questions."""
    place = {question: number for number, question in enumerate(data.questions)}
    right, kinds = [], []
    for rows in folds(data.rows, kinds_per_level):
        part = Labelled.of(rows, list(LEVELS), soft=False)
        probs_QG = predict(part, torch.tensor([place[question] for question in part.questions]))
        tested_B = part.places("test_kinds")
        right.append((probs_QG[part.question_B[tested_B]].argmax(-1) == part.level_B[tested_B]).double())
        kinds += [part.rows[number]["kind"] for number in tested_B.tolist()]
    return with_interval(*mean_interval(torch.cat(right).numpy(), kinds), digits=3)


def test_scores(probs_QG: torch.Tensor, data: Labelled) -> list[str]:
    """Accuracy on each test split."""
    found = []
    for split in TEST_SPLITS:
        places_B = data.places(split)
        groups = [bootstrap_group(data.rows[number], split) for number in places_B.tolist()]
        probs_BG = probs_QG[data.question_B[places_B]].numpy()
        accuracy = scores(probs_BG, data.level_B[places_B].numpy(), groups)["accuracy"]
        found.append(with_interval(*accuracy, digits=3))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="language model: a folder, or a repository of the Hub")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 6, 12, 20], help="layers to read")
    parser.add_argument("--dtype", default="bfloat16", help="of the language model (bfloat16)")
    options = parser.parse_args()
    data = Labelled.of(seed_corpus(), list(LEVELS), soft=False)
    pooled = pooled_states(options.text, data.questions, options.layers, getattr(torch, options.dtype))

    def by_layer(layer: int, count: int | None = None) -> str:
        return cross_validated(lambda part, own_Q: controller_probs(pooled[layer][own_Q], part), data, count)

    rows = [[layer, by_layer(layer), *test_scores(controller_probs(pooled[layer], data), data)] for layer in pooled]
    words = cross_validated(lambda part, _: bag_of_words(part), data)
    rows.append(["bag of words", words, *test_scores(bag_of_words(data), data)])
    print(markdown_table(["layer", "kinds, cross-validated", *TEST_SPLITS], rows), end="\n\n", flush=True)
    layers = dict.fromkeys((options.layers[0], options.layers[-1]))
    rows = [[count, *(by_layer(layer, count) for layer in layers)] for count in (2, 4, 8, 12, 18)]
    print(markdown_table(["kinds a level", *(f"layer {layer}" for layer in layers)], rows))


if __name__ == "__main__":
    main()
