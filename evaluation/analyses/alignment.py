"""Alignment of text and image, layer by layer: cosines between their states inside the language model.

Each sample is a full prompt: image, question and, where the row has one, the answer. In each layer the states of a
group of tokens are averaged, and the cosine of two such means is taken per sample:

- `question`, `answer`: the words of the question and of the answer, without the tokens of the chat template.
- `pixel`, `semantic`: the image tokens of each kind, without empty semantic slots.
- `projector`: the patches as the projector returns them, the same in every layer.

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
from granulon.hub.inference import open_image, question_about
from granulon.hub.text import markdown_table, with_interval
from modeling_granulon.image_tokens import PIXEL_ROLE, SEMANTIC_ROLE, hide_slots, slot_roles

from .files import FAINT

GROUPS = PIXEL, SEMANTIC, QUESTION, ANSWER = "pixel", "semantic", "question", "answer"
PROJECTOR = "projector"
PAIRS = (
    *((text, image) for text in (QUESTION, ANSWER) for image in (PIXEL, SEMANTIC, PROJECTOR)),
    (SEMANTIC, PIXEL),
)
MEASURES = {
    "cosine": "cosine",
    "cosine_other_image": "cosine, another sample's image",
    "centred": "centred cosine",
    "centred_other_image": "centred cosine, another sample's image",
}
ROUNDING = 1e-5  # share of a state's length below which its centred state is rounding error
MOST_NUMBERS = 13  # layers up to which the heatmaps show numbers


def alignment(model, processor, rows: list[dict], *, granularity=None, batch_size: int = 8) -> dict:
    """
    Cosines of text states and image states in every layer.

    Args:
        rows: with `image`, `question` and optionally `answer`, of at least two images.
        granularity: a level for all rows, in place of the controller's choice.

    Returns:
        dict: `layers`, `samples`, `images`, and `pairs`, each with the names of its two groups, `samples`, and for
        each of `MEASURES` a list of (value, low, high), one for each layer; nan where nothing can be compared.

    Raises:
        ValueError: fewer than two samples or images, or an image that cannot be used.
    """
    if len(rows) < 2:
        raise ValueError(f"alignment compares samples with each other and needs at least two, found {len(rows)}")
    states_SLCE, images = mean_states(model, processor, rows, granularity=granularity, batch_size=batch_size)
    return {
        "layers": states_SLCE.shape[1] - 1,
        "samples": len(rows),
        "images": len(set(images)),
        "pairs": compare(states_SLCE, images),
    }


def mean_states(model, processor, rows: list[dict], *, granularity=None, batch_size: int = 8):
    """
    The mean state of each group of tokens in each layer.

    Returns:
        (S,L,C,E) fp32, L = 1 + decoder layers, C as `GROUPS`, nan where a sample has no such token; and for each
        sample the hash of its image.
    """
    means, hashes = [], []
    for start in tqdm(range(0, len(rows), batch_size), desc="states", unit="batch", leave=False, disable=None):
        batch = rows[start : start + batch_size]
        images = [open_image(row["image"]) for row in batch]
        hashes += [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        means.append(_batch_states(model, processor, batch, images, granularity))
    return np.concatenate(means), hashes


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
    seen_BT = hide_slots(inputs["attention_mask"], placeholder_BT, visual.place(layout).visible_BR)
    role_BT = slot_roles(placeholder_BT, layout.role_BR).masked_fill(seen_BT == 0, -1)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    outputs = base(**text, visual=visual, output_hidden_states=True)
    roles_B2T = torch.stack([role_BT == PIXEL_ROLE, role_BT == SEMANTIC_ROLE], 1)
    weights_BCT = torch.cat([roles_B2T, texts_B2T.to(roles_B2T.device)], 1).float()
    weights_BCT = weights_BCT / weights_BCT.sum(-1, keepdim=True)  # 0 / 0 is nan: a group without tokens has no mean
    means = [weights_BCT.to(states.device) @ states.float() for states in outputs.hidden_states]
    return torch.stack([states.cpu() for states in means], 1).numpy()


def compare(states_SLCE: np.ndarray, images: list[str]) -> list[dict]:
    """
    The cosines of every pair of groups, see `alignment`.

    Args:
        states_SLCE, images: of `mean_states`.

    Raises:
        ValueError: all samples show the same image.
    """
    other_S = next_other_image(images)
    there = np.isfinite(states_SLCE)
    mean_LCE = np.where(there, states_SLCE, 0).sum(0) / np.maximum(there.sum(0), 1)
    raw, centred = _by_group(states_SLCE), _by_group(states_SLCE - mean_LCE)
    found = []
    for text, image in PAIRS:
        # Rounding errors are relative to the raw states.
        sizes = {name: np.linalg.norm(raw[name], axis=-1) for name in (text, image)}
        measures = {}
        for name, states in (("cosine", raw), ("centred", centred)):
            for suffix, order in (("", slice(None)), ("_other_image", other_S)):
                one, other = states[text], states[image][order]
                measures[name + suffix] = _cosine(one, other, sizes[text], sizes[image][order])
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


def _by_group(states_SLCE: np.ndarray) -> dict[str, np.ndarray]:
    """(S,L,E) of each group; the projector's output is the pixel tokens' state at layer 0."""
    groups = dict(zip(GROUPS, np.moveaxis(states_SLCE, 2, 0)))
    return groups | {PROJECTOR: np.broadcast_to(groups[PIXEL][:, :1], groups[PIXEL].shape)}


def _cosine(one_SLE, other_SLE, one_size_SL, other_size_SL) -> np.ndarray:
    """(S,L), nan where a state is absent or only rounding error."""
    lengths_SL, other_lengths_SL = np.linalg.norm(one_SLE, axis=-1), np.linalg.norm(other_SLE, axis=-1)
    usable_SL = (lengths_SL > ROUNDING * one_size_SL) & (other_lengths_SL > ROUNDING * other_size_SL)
    product_SL = (one_SLE * other_SLE).sum(-1)
    return np.where(usable_SL, product_SL / np.where(usable_SL, lengths_SL * other_lengths_SL, 1), np.nan)


def _intervals(cosine_SL: np.ndarray, images: list[str]) -> list[tuple[float, float, float]]:
    """The mean of each layer and its bootstrap interval over images; all layers use the same resamples."""
    there_SL = np.isfinite(cosine_SL)
    names, image_S = np.unique(np.asarray(images), return_inverse=True)
    sums_UX = np.zeros((len(names), 2 * cosine_SL.shape[1]))
    np.add.at(sums_UX, image_S, np.concatenate([np.where(there_SL, cosine_SL, 0), there_SL], axis=1))
    value_L = _means(sums_UX.sum(0, keepdims=True))[0]
    drawn_RL = resampled(_means, sums_UX)
    return [(float(value), *percentiles(drawn_R)) for value, drawn_R in zip(value_L, drawn_RL.T)]


def _means(sums_RX: np.ndarray) -> np.ndarray:
    total_RL, count_RL = np.split(sums_RX, 2, axis=1)
    return np.where(count_RL > 0, total_RL / np.maximum(count_RL, 1), np.nan)


def _pair_names(report: dict) -> list[str]:
    return [f"{pair['text']} × {pair['image']}" for pair in report["pairs"]]


def alignment_markdown(report: dict) -> str:
    """A table for each measure, with a row for each layer."""
    parts = [f"{report['samples']} samples of {report['images']} images; 95% bootstrap intervals over images."]
    for measure, title in MEASURES.items():
        rows = [
            [layer or "input", *(with_interval(*pair[measure][layer]) for pair in report["pairs"])]
            for layer in range(report["layers"] + 1)
        ]
        parts += [f"### {title[0].upper()}{title[1:]}", markdown_table(["layer", *_pair_names(report)], rows)]
    return "\n\n".join(parts)


def draw_alignment(report: dict, title: str = "") -> Figure:
    """Four heatmaps, layers by pairs: raw and centred cosine, with the own and with another sample's image."""
    pairs, layers = report["pairs"], report["layers"] + 1
    width = max(4.2, 0.5 * min(layers, MOST_NUMBERS) + 0.12 * max(layers - MOST_NUMBERS, 0) + 1)
    figure = Figure(figsize=(2 * width + 1.9, 2 * (0.36 * len(pairs) + 0.75) + 0.8), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for row, name in enumerate(("cosine", "centred")):
        measures = (name, f"{name}_other_image")
        value_2PL = np.array([[[entry[0] for entry in pair[m]] for pair in pairs] for m in measures], float)
        limit = 1.0 if row == 0 else max(0.1, float(np.nanmax(np.abs(value_2PL), initial=0)))
        for axes, measure, value_PL in zip(panels[row], measures, value_2PL):
            shown = _draw_heatmap(axes, value_PL, limit)
            axes.set_title(MEASURES[measure], fontsize=10)
        bar = figure.colorbar(shown, ax=panels[row], shrink=0.9, aspect=14, pad=0.01)
        bar.set_label("mean cosine", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        panels[row][0].set_yticks(range(len(pairs)), _pair_names(report), fontsize=8)
    ticks = list(range(0, layers, max(1, round(layers / MOST_NUMBERS))))
    for axes in panels[1]:
        axes.set_xticks(ticks, [str(tick or "in") for tick in ticks], fontsize=8)
        axes.set_xlabel("layer of the language model", fontsize=9)
    name = f": {title}" if title else ""
    counted = f"{report['samples']} samples, {report['images']} images"
    figure.suptitle(f"States of text and image{name} ({counted})", fontsize=11)
    return figure


def _draw_heatmap(axes, value_PL: np.ndarray, limit: float):
    """Orange is similar, purple is opposed, white is unknown."""
    shown = axes.imshow(value_PL, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for place in range(1, value_PL.shape[1]):
        axes.axvline(place - 0.5, color="white", linewidth=1)
    for place in range(1, value_PL.shape[0]):
        axes.axhline(place - 0.5, color="white", linewidth=1)
    if value_PL.shape[1] <= MOST_NUMBERS:
        for (pair, layer), value in np.ndenumerate(value_PL):
            text, colour = (f"{value:.2f}".replace("-0.00", "0.00"), "black") if np.isfinite(value) else ("–", FAINT)
            colour = "white" if abs(value) > 0.65 * limit else colour
            axes.text(layer, pair, text, ha="center", va="center", fontsize=7.5, color=colour)
    return shown
