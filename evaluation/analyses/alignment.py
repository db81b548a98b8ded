"""Alignment of text and image, layer by layer: cosines between mean states inside the language model.

`DEFINITIONS` names what is compared:

- `parts` (ours): one prompt with image, question and, where the row has one, the answer. Compared are the words of
  `question` and `answer`, without the tokens of the chat template, with the `pixel` and `semantic` tokens, without
  empty slots, and with the `projector`'s output for the patches, the same in every layer.
- `authors`: what the paper's published code computes. The mean over all tokens of the `prompt` (chat template, image
  and question, without an answer) is compared with that of a second prompt whose user says the reference answer and
  shows no image (`answer alone`). Both have the template's tokens in common.

Layer 0 is the input of the language model, layer l the output of its l-th decoder layer, the last one after the final
norm.

States of a language model share a direction that has nothing to do with their meaning, so raw cosines are high for any
two of them. `centred` subtracts from each state the mean of its group and layer over all samples. Both are also
computed between a text and the image of *another* sample: what is not above that figure does not come from the image.

Figures are means over samples with 95% bootstrap intervals over images. The subtracted means are not resampled: with
few samples the intervals are too narrow, and cosines to other images are about -1 / (number of images - 1) and not 0.

Shapes: S samples, B rows of a batch, T tokens, L layers and the input, C groups, E text width, U images, X sums.
"""

import hashlib

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from granulon.evaluation.statistics import percentiles, resampled
from granulon.hub.inference import encode, open_image, question_about
from granulon.hub.text import markdown_table, with_interval
from modeling_granulon.image_tokens import PIXEL_ROLE, SEMANTIC_ROLE, hide_slots, slot_roles

from .files import COLOURS, MARKERS

PIXEL, SEMANTIC, QUESTION, ANSWER, PROMPT = "pixel", "semantic", "question", "answer", "prompt"
PROJECTOR, ANSWER_ALONE = "projector", "answer alone"
DEFINITIONS = {  # pairs of a text and an image
    "parts": [(text, image) for text in (QUESTION, ANSWER) for image in (PIXEL, SEMANTIC, PROJECTOR)]
    + [(SEMANTIC, PIXEL)],
    "authors": [(ANSWER_ALONE, PROMPT)],
}
MEASURES = {
    "cosine": "cosine",
    "cosine_other_image": "cosine, another sample's image",
    "centred": "centred cosine",
    "centred_other_image": "centred cosine, another sample's image",
}
ROUNDING = 1e-5  # share of a state's length below which its centred state is rounding error


def alignment(
    model, processor, rows: list[dict], *, definition="parts", granularity=None, batch_size: int = 8
) -> dict:
    """
    Cosines of text states and image states in every layer.

    Args:
        rows: with `image`, `question` and optionally `answer`, of at least two images.
        definition: of `DEFINITIONS`; `authors` leaves out rows without an answer.
        granularity: a level for all rows, in place of the controller's choice.

    Returns:
        dict: `definition`, `layers`, `samples`, `images`, and `pairs`, each with the names of its two groups,
        `samples`, and for each of `MEASURES` a list of (value, low, high): one for the input, one for each layer and
        one for the mean over all layers; nan where nothing can be compared.

    Raises:
        ValueError: fewer than two samples or images, or an image that cannot be used.
    """
    authors = definition == "authors"
    rows = [row for row in rows if row.get("answer") or not authors]
    if len(rows) < 2:
        needed = "samples with answers" if authors else "samples"
        raise ValueError(f"alignment compares {needed} with each other and needs at least two, found {len(rows)}")
    prompts = [row | {"answer": None} for row in rows] if authors else rows
    states, images = mean_states(model, processor, prompts, granularity=granularity, batch_size=batch_size)
    if authors:
        states[ANSWER_ALONE] = answers_alone(model, processor, [row["answer"] for row in rows], batch_size)
    return {
        "definition": definition,
        "layers": states[PROMPT].shape[1] - 1,
        "samples": len(rows),
        "images": len(set(images)),
        "pairs": compare(states, images, DEFINITIONS[definition]),
    }


def mean_states(model, processor, rows: list[dict], *, granularity=None, batch_size: int = 8):
    """
    The mean state of each group of tokens in each layer.

    Returns:
        (S,L,E) fp32 of each group by name, L = 1 + decoder layers, nan where a sample has no such token; and for each
        sample the hash of its image.
    """
    means, hashes = [], []
    for start in tqdm(range(0, len(rows), batch_size), desc="states", unit="batch", leave=False, disable=None):
        batch = rows[start : start + batch_size]
        images = [open_image(row["image"]) for row in batch]
        hashes += [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        means.append(_batch_states(model, processor, batch, images, granularity))
    groups = (PIXEL, SEMANTIC, PROMPT, QUESTION, ANSWER)
    states = dict(zip(groups, np.moveaxis(np.concatenate(means), 2, 0)))
    # The projector's output is the pixel tokens' state at layer 0.
    return states | {PROJECTOR: np.broadcast_to(states[PIXEL][:, :1], states[PIXEL].shape)}, hashes


def prompts_with_answers(processor, rows: list[dict], images: list):
    """
    Prompts followed by their answers, and the places of question and answer in them.

    Returns:
        the processor's output; (B,2,T) bool, the tokens of the question and those of the answer.

    Raises:
        ValueError: the chat template changes the text of a question.
    """
    chats = [question_about(image, row["question"]) for image, row in zip(images, rows)]
    prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
    answers = [row.get("answer") or "" for row in rows]
    inputs = processor(
        text=[prompt + answer for prompt, answer in zip(prompts, answers)],
        images=[[image] for image in images],
        padding=True,
        return_tensors="pt",
        add_special_tokens=False,  # the template wrote them
        return_offsets_mapping=True,
    )
    offsets_BT2 = inputs.pop("offset_mapping")
    slots_B = (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    spans = []
    for prompt, answer, slots in zip(prompts, answers, slots_B):
        question = processor.question(prompt)
        expanded = prompt.replace(processor.image_token, processor.image_token * slots)
        start = expanded.rfind(question)
        if start < 0:
            raise ValueError(f"the prompt does not contain its question {question!r}; check the chat template")
        spans.append([(start, start + len(question)), (len(expanded), len(expanded) + len(answer))])
    bounds_B212 = torch.tensor(spans).unsqueeze(2)  # (B,2,2) -> (B,2,1,2)
    start_B1T, end_B1T = offsets_BT2[:, None, :, 0], offsets_BT2[:, None, :, 1]
    # Padding and added special tokens have offsets of length 0.
    texts_B2T = (start_B1T < bounds_B212[..., 1]) & (end_B1T > bounds_B212[..., 0]) & (end_B1T > start_B1T)
    return inputs, texts_B2T


@torch.no_grad()
def _batch_states(model, processor, rows: list[dict], images: list, granularity) -> np.ndarray:
    """(B,L,C,E) of one batch."""
    inputs, texts_B2T = prompts_with_answers(processor, rows, images)
    inputs = inputs.to(model.device, dtype=model.dtype)
    base, placeholder_BT = model.model, inputs["input_ids"] == model.config.image_token_id
    visual = base.encode(**inputs, granularity=granularity)
    layout = base.layout(placeholder_BT, visual=visual)
    seen_BT = hide_slots(inputs["attention_mask"], placeholder_BT, visual.place(layout).visible_BR) != 0
    role_BT = slot_roles(placeholder_BT, layout.role_BR).masked_fill(~seen_BT, -1)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    outputs = base(**text, visual=visual, output_hidden_states=True)
    shown_B3T = torch.stack([role_BT == PIXEL_ROLE, role_BT == SEMANTIC_ROLE, seen_BT], 1)
    return _means_of(outputs.hidden_states, torch.cat([shown_B3T, texts_B2T.to(shown_B3T.device)], 1))


@torch.no_grad()
def answers_alone(model, processor, answers: list[str], batch_size: int = 8) -> np.ndarray:
    """(S,L,E): the mean state of all tokens of a prompt whose user says the answer."""
    means = []
    for start in range(0, len(answers), batch_size):
        chats = [
            [{"role": "user", "content": [{"type": "text", "text": text}]}] for text in answers[start:][:batch_size]
        ]
        text = {name: encode(model, processor, chats).inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model.model(**text, output_hidden_states=True)
        means.append(_means_of(outputs.hidden_states, text["attention_mask"][:, None] != 0))
    return np.concatenate(means)[:, :, 0]


def _means_of(hidden_states, groups_BCT: torch.Tensor) -> np.ndarray:
    """(B,L,C,E): the mean of each group of tokens in each layer, nan of a group without tokens."""
    weights_BCT = groups_BCT.float() / groups_BCT.sum(-1, keepdim=True)  # 0 / 0 is nan
    return torch.stack([(weights_BCT.to(states.device) @ states.float()).cpu() for states in hidden_states], 1).numpy()


def compare(states: dict[str, np.ndarray], images: list[str], pairs: list[tuple[str, str]]) -> list[dict]:
    """
    The cosines of pairs of groups, see `alignment`.

    Args:
        states, images: of `mean_states`.

    Raises:
        ValueError: all samples show the same image.
    """
    other_S, found = next_other_image(images), []
    for text, image in pairs:
        measures = {}
        for name, change in (("cosine", lambda states_SLE: states_SLE), ("centred", _centred)):
            for suffix, order in (("", slice(None)), ("_other_image", other_S)):
                # Rounding errors are relative to the raw states.
                sizes = [np.linalg.norm(raw, axis=-1) for raw in (states[text], states[image][order])]
                measures[name + suffix] = _cosine(change(states[text]), change(states[image])[order], *sizes)
        samples = int(np.isfinite(measures["cosine"]).any(1).sum())
        if samples:
            intervals = {name: _intervals(cosine_SL, images) for name, cosine_SL in measures.items()}
            found.append({"text": text, "image": image, "samples": samples, **intervals})
    return found


def next_other_image(images: list[str]) -> np.ndarray:
    """For each sample the index of the next one, cyclically, that shows another image: (S,)."""
    if len(set(images)) < 2:
        raise ValueError(f"all {len(images)} samples show one image; give samples of at least two")
    count = len(images)
    return np.array(
        [next((i + k) % count for k in range(1, count) if images[(i + k) % count] != images[i]) for i in range(count)]
    )


def _centred(states_SLE: np.ndarray) -> np.ndarray:
    """Each state minus the mean of its layer over the samples that have one."""
    there = np.isfinite(states_SLE)
    return states_SLE - np.where(there, states_SLE, 0).sum(0) / np.maximum(there.sum(0), 1)


def _cosine(one_SLE, other_SLE, one_size_SL, other_size_SL) -> np.ndarray:
    """(S,L), nan where a state is absent or only rounding error."""
    lengths_SL, other_lengths_SL = np.linalg.norm(one_SLE, axis=-1), np.linalg.norm(other_SLE, axis=-1)
    usable_SL = (lengths_SL > ROUNDING * one_size_SL) & (other_lengths_SL > ROUNDING * other_size_SL)
    product_SL = (one_SLE * other_SLE).sum(-1)
    return np.where(usable_SL, product_SL / np.where(usable_SL, lengths_SL * other_lengths_SL, 1), np.nan)


def _intervals(cosine_SL: np.ndarray, images: list[str]) -> list[tuple[float, float, float]]:
    """The mean of each layer, then that of all layers but the input, and bootstrap intervals over images."""
    cosine_SL = np.column_stack([cosine_SL, cosine_SL[:, 1:].mean(1)])
    there_SL = np.isfinite(cosine_SL)
    names, image_S = np.unique(np.asarray(images), return_inverse=True)
    sums_UX = np.zeros((len(names), 2 * cosine_SL.shape[1]))
    np.add.at(sums_UX, image_S, np.concatenate([np.where(there_SL, cosine_SL, 0), there_SL], axis=1))
    value_L = _means(sums_UX.sum(0, keepdims=True))[0]
    drawn_RL = resampled(_means, sums_UX)  # all layers use the same resamples
    return [(float(value), *percentiles(drawn_R)) for value, drawn_R in zip(value_L, drawn_RL.T)]


def _means(sums_RX: np.ndarray) -> np.ndarray:
    total_RL, count_RL = np.split(sums_RX, 2, axis=1)
    return np.where(count_RL > 0, total_RL / np.maximum(count_RL, 1), np.nan)


def alignment_markdown(report: dict) -> str:
    """A table for each measure, with a row for each layer and one for their mean."""
    parts = [
        f"Definition: {report['definition']}; {report['samples']} samples of {report['images']} images; 95% bootstrap "
        "intervals over images."
    ]
    layers = ["input", *range(1, report["layers"] + 1), f"mean of 1 to {report['layers']}"]
    for measure, title in MEASURES.items():
        rows = [
            [layer, *(with_interval(*pair[measure][place]) for pair in report["pairs"])]
            for place, layer in enumerate(layers)
        ]
        names = [f"{pair['text']} × {pair['image']}" for pair in report["pairs"]]
        parts += [f"### {title[0].upper()}{title[1:]}", markdown_table(["layer", *names], rows)]
    return "\n\n".join(parts)


def draw_alignment(report: dict) -> Figure:
    """Four panels, raw and centred cosine with the own and with another sample's image: a line for each pair."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels, layers = figure.subplots(2, 2, sharex=True, sharey="row"), report["layers"] + 1
    for axes, (measure, title) in zip(panels.flat, MEASURES.items()):
        for pair, colour, marker in zip(report["pairs"], COLOURS, MARKERS):
            value_L, low_L, high_L = np.array(pair[measure][:layers], float).T
            name = f"{pair['text']} × {pair['image']}"
            axes.plot(value_L, color=colour, marker=marker, markersize=4, linewidth=1, label=name)
            axes.fill_between(range(layers), low_L, high_L, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[1]:
        axes.set_xlabel("layer of the language model (0: its input)", fontsize=9)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure
