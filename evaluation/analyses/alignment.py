"""Do text and image agree, layer by layer? Cosines between their states inside the language model.

Every sample is one full prompt: image, question and, where a row has one, the answer. In each layer the states of a
group of tokens are averaged, and the cosine of two such means is taken, sample by sample:

- `question`, `answer`: the words of the question and of the answer; the chat template's tokens belong to neither.
- `pixel`, `semantic`: the image's tokens of each kind; empty semantic slots are not there.
- `projector`: the tower's patches as the projector gives them, the same in every layer: does the text move towards
  what the tower said, or do both move elsewhere?

Layer 0 is the sequence as it enters the language model, layer l the output of its l-th decoder layer; the last one is
given after the final norm, as the head reads it.

A raw cosine says little alone: the states of a language model share a direction that has nothing to do with what they
mean, so that any two of them look alike. Hence two more figures. `centred` takes from each state the mean of its group
and layer over all samples, and asks whether what differs between samples differs alike. And both are also computed
between a text and the image of *another* sample: what is not above that figure comes from no image.

Figures are means over samples with 95% bootstrap intervals in which whole images are drawn, since the questions about
one image are alike; the means that are taken away stay as they are, so that with few samples the intervals are too
narrow, and the cosines to other images are about -1 / (number of images - 1) and not 0.

Shapes: S samples, B rows of a batch, T tokens, L layers and the input, C groups, E text width, U images, X figures.
"""

import hashlib

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from granulon.evaluation.statistics import percentiles, resampled
from granulon.hub.ask import prompt_of
from modeling_granulon.image_tokens import PIXEL_ROLE, SEMANTIC_ROLE, hide_slots, slot_roles

from .files import FAINT, opened, ranged, table

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
NOTHING = 1e-5  # of a state's own length: what is left after centring is rounding
MOST_NUMBERS = 13  # columns that still leave room for a number in each field


def alignment(model, processor, rows: list[dict], *, granularity=None, batch_size: int = 8, seed: int = 0) -> dict:
    """
    Cosines of text states and image states in every layer.

    Args:
        rows: with `image`, `question` and perhaps `answer`, of at least two images.
        granularity: a level for all rows, in place of the controller's choice.
        seed: of the bootstrap.

    Returns:
        dict: `layers`, `samples`, `images`, and `pairs`, each with its two groups, `samples`, and for each of
        `MEASURES` a list of (value, low, high), one for each layer; nan where nothing was to be compared.

    Raises:
        ValueError: fewer than two samples, or than two images; an image that cannot be used.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if len(rows) < 2:
        raise ValueError(f"alignment compares samples with each other: two are needed at least, found {len(rows)}")
    states_SLCE, images = mean_states(model, processor, rows, granularity=granularity, batch_size=batch_size)
    return {
        "layers": states_SLCE.shape[1] - 1,
        "samples": len(rows),
        "images": len(set(images)),
        "pairs": compared(states_SLCE, images, seed),
    }


def mean_states(model, processor, rows: list[dict], *, granularity=None, batch_size: int = 8):
    """
    The mean state of each group of tokens in each layer.

    Returns:
        (S,L,C,E) fp32, L = 1 + decoder layers, C as `GROUPS`, nan where a sample has no such token; and for each
        sample the hash of its image.
    """
    means, images = [], []
    for start in tqdm(range(0, len(rows), batch_size), desc="states", unit="batch", leave=False, disable=None):
        chunk = rows[start : start + batch_size]
        pictures = [opened(row) for row in chunk]
        images += [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures]
        means.append(_batch_states(model, processor, chunk, pictures, granularity))
    return np.concatenate(means), images


def prompt_groups(processor, rows: list[dict], pictures: list):
    """
    Prompts with their answers, as the model takes them, and where question and answer stand in them.

    Returns:
        the processor's output; (B,2,T) bool, the tokens of the question and those of the answer.
    """
    asked = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}] for row in rows
    ]
    prompts = processor.apply_chat_template(asked, add_generation_prompt=True)
    answers = [row.get("answer") or "" for row in rows]
    inputs = processor(
        text=[prompt + answer for prompt, answer in zip(prompts, answers)],
        images=[[picture] for picture in pictures],
        padding=True,
        return_tensors="pt",
        add_special_tokens=False,  # the template wrote them
        return_offsets_mapping=True,
    )
    offsets_BT2 = inputs.pop("offset_mapping")
    slots_B = (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    token = processor.image_token
    spans = []
    for prompt, answer, slots in zip(prompts, answers, slots_B):
        question = processor.question(prompt)
        expanded = prompt.replace(token, token * slots)
        start = expanded.rfind(question)
        if start < 0:
            raise ValueError(
                f"the prompt does not hold its question {question!r} in one piece; check the chat template"
            )
        spans.append([(start, start + len(question)), (len(expanded), len(expanded) + len(answer))])
    bounds_B212 = torch.tensor(spans).unsqueeze(2)  # (B,2,2) -> (B,2,1,2)
    start_B1T, end_B1T = offsets_BT2[:, None, :, 0], offsets_BT2[:, None, :, 1]
    # Padding and special tokens that the text does not hold have offsets of no length.
    texts_B2T = (start_B1T < bounds_B212[..., 1]) & (end_B1T > bounds_B212[..., 0]) & (end_B1T > start_B1T)
    return inputs, texts_B2T


@torch.no_grad()
def _batch_states(model, processor, rows: list[dict], pictures: list, granularity) -> np.ndarray:
    """(B,L,C,E) of one batch."""
    inputs, texts_B2T = prompt_groups(processor, rows, pictures)
    inputs = inputs.to(model.device, dtype=model.dtype)
    base, placeholder_BT = model.model, inputs["input_ids"] == model.config.image_token_id
    visual = base.encode(**inputs, granularity=granularity)
    layout = base.layout(placeholder_BT, visual=visual)
    seen_BT = hide_slots(inputs["attention_mask"], placeholder_BT, visual.place(layout).visible_BR)
    role_BT = slot_roles(placeholder_BT, layout.role_BR).masked_fill(seen_BT == 0, -1)
    outputs = base(**prompt_of(inputs), visual=visual, output_hidden_states=True)
    roles_B2T = torch.stack([role_BT == PIXEL_ROLE, role_BT == SEMANTIC_ROLE], 1)
    weights_BCT = torch.cat([roles_B2T, texts_B2T.to(roles_B2T.device)], 1).float()
    weights_BCT = weights_BCT / weights_BCT.sum(-1, keepdim=True)  # 0 / 0 is nan: a group without tokens has no mean
    means = [weights_BCT.to(states.device) @ states.float() for states in outputs.hidden_states]
    return torch.stack([states.cpu() for states in means], 1).numpy()


def compared(states_SLCE: np.ndarray, images: list[str], seed: int = 0) -> list[dict]:
    """
    The cosines of every pair of groups, see `alignment`.

    Raises:
        ValueError: all samples show one image.
    """
    other_S = other_image(images)
    raw = _with_projector(states_SLCE)
    centred = _with_projector(states_SLCE - _mean_over_samples(states_SLCE))
    found = []
    for text, image in PAIRS:
        # Rounding is measured against the states as they were.
        sizes = {name: np.linalg.norm(raw[name], axis=-1) for name in (text, image)}
        cosines = {
            name: _cosine(states[text], states[image][order], sizes[text], sizes[image][order])
            for name, states, order in (
                ("cosine", raw, slice(None)),
                ("cosine_other_image", raw, other_S),
                ("centred", centred, slice(None)),
                ("centred_other_image", centred, other_S),
            )
        }
        samples = int(np.isfinite(cosines["cosine"]).any(1).sum())
        intervals = {name: _intervals(cosine_SL, images, seed) for name, cosine_SL in cosines.items()}
        if samples:
            found.append({"text": text, "image": image, "samples": samples, **intervals})
    return found


def other_image(images: list[str]) -> np.ndarray:
    """For each sample the place of the next one, the first following the last, that shows another image: (S,)."""
    if len(set(images)) < 2:
        raise ValueError(
            f"all {len(images)} samples show one image; give samples of two at least, so that they can be compared"
        )
    count = len(images)
    return np.array(
        [next((i + k) % count for k in range(1, count) if images[(i + k) % count] != images[i]) for i in range(count)]
    )


def _with_projector(states_SLCE: np.ndarray) -> dict[str, np.ndarray]:
    """(S,L,E) by group; what the projector gave is the pixel tokens' state at layer 0."""
    named = {name: states_SLCE[:, :, place] for place, name in enumerate(GROUPS)}
    return named | {PROJECTOR: np.broadcast_to(named[PIXEL][:, :1], named[PIXEL].shape)}


def _mean_over_samples(states_SLCE: np.ndarray) -> np.ndarray:
    """(L,C,E), of those samples that have the group."""
    there = np.isfinite(states_SLCE)
    return np.where(there, states_SLCE, 0).sum(0) / np.maximum(there.sum(0), 1)


def _cosine(one_SLE, other_SLE, one_size_SL, other_size_SL) -> np.ndarray:
    """(S,L), nan where a state is absent or has nothing left."""
    lengths_SL, other_lengths_SL = np.linalg.norm(one_SLE, axis=-1), np.linalg.norm(other_SLE, axis=-1)
    left_SL = (lengths_SL > NOTHING * one_size_SL) & (other_lengths_SL > NOTHING * other_size_SL)
    product_SL = (one_SLE * other_SLE).sum(-1)
    return np.where(left_SL, product_SL / np.where(left_SL, lengths_SL * other_lengths_SL, 1), np.nan)


def _intervals(cosine_SL: np.ndarray, images: list[str], seed: int) -> list[tuple[float, float, float]]:
    """The mean of each layer and its bootstrap interval over images; all layers are resampled alike."""
    there_SL = np.isfinite(cosine_SL)
    _, image_S = np.unique(np.asarray(images), return_inverse=True)
    sums_UX = np.zeros((image_S.max() + 1, 2 * cosine_SL.shape[1]))
    np.add.at(sums_UX, image_S, np.concatenate([np.where(there_SL, cosine_SL, 0), there_SL], axis=1))
    whole_L = _means(sums_UX.sum(0, keepdims=True))[0]
    drawn_RL = resampled(_means, sums_UX, seed)
    return [(float(value), *percentiles(drawn_R)) for value, drawn_R in zip(whole_L, drawn_RL.T)]


def _means(sums_RX: np.ndarray) -> np.ndarray:
    total_RL, count_RL = np.split(sums_RX, 2, axis=1)
    return np.where(count_RL > 0, total_RL / np.maximum(count_RL, 1), np.nan)


def pair_name(pair: dict) -> str:
    return f"{pair['text']} × {pair['image']}"


def alignment_markdown(report: dict) -> str:
    """A table for each figure, a line for each layer."""
    pairs = report["pairs"]
    parts = [f"{report['samples']} samples of {report['images']} images; 95% bootstrap intervals over images."]
    for measure, title in MEASURES.items():
        lines = [
            ["input" if layer == 0 else layer, *(ranged(*pair[measure][layer]) for pair in pairs)]
            for layer in range(report["layers"] + 1)
        ]
        parts += [f"### {title[0].upper()}{title[1:]}", table(["layer", *map(pair_name, pairs)], lines)]
    return "\n\n".join(parts)


def draw_alignment(report: dict, title: str = "") -> Figure:
    """Four heatmaps, layers by pairs: raw and centred cosine, with the own and with another sample's image."""
    pairs, layers = report["pairs"], report["layers"] + 1
    width = max(4.2, 0.5 * min(layers, MOST_NUMBERS) + 0.12 * max(layers - MOST_NUMBERS, 0) + 1)
    figure = Figure(figsize=(2 * width + 1.9, 2 * (0.36 * len(pairs) + 0.75) + 0.8), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for row, measures in enumerate((("cosine", "cosine_other_image"), ("centred", "centred_other_image"))):
        values = {name: np.array([[entry[0] for entry in pair[name]] for pair in pairs], float) for name in measures}
        limit = 1.0 if row == 0 else max(0.1, *(float(np.nanmax(np.abs(v), initial=0)) for v in values.values()))
        for axes, name in zip(panels[row], measures):
            shown = _draw_heatmap(axes, values[name], limit)
            axes.set_title(MEASURES[name], fontsize=10)
        bar = figure.colorbar(shown, ax=panels[row], shrink=0.9, aspect=14, pad=0.01)
        bar.set_label("mean cosine", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        panels[row][0].set_yticks(range(len(pairs)), [pair_name(pair) for pair in pairs], fontsize=8)
    step = max(1, round(layers / MOST_NUMBERS))
    ticks = list(range(0, layers, step))
    for axes in panels[1]:
        axes.set_xticks(ticks, ["in" if tick == 0 else str(tick) for tick in ticks], fontsize=8)
        axes.set_xlabel("layer of the language model", fontsize=9)
    counted = f"{report['samples']} samples, {report['images']} images"
    figure.suptitle("States of text and image" + (f": {title}" if title else "") + f" ({counted})", fontsize=11)
    return figure


def _draw_heatmap(axes, value_PL: np.ndarray, limit: float):
    """Orange is alike, purple is opposed; where there is nothing, nothing is drawn."""
    shown = axes.imshow(value_PL, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(value_PL.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(value_PL.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if value_PL.shape[1] <= MOST_NUMBERS:
        for (line, layer), value in np.ndenumerate(value_PL):
            strong = np.isfinite(value) and abs(value) > 0.65 * limit
            text = f"{value:.2f}".replace("-0.00", "0.00") if np.isfinite(value) else "–"
            colour = "white" if strong else FAINT if not np.isfinite(value) else "black"
            axes.text(layer, line, text, ha="center", va="center", fontsize=7.5, color=colour)
    return shown
