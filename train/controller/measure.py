"""Measured labels: how likely a model finds the right answer at each level.

For a question, an answer and images, p(g) ∝ exp(−NLL_g / τ − cost · tokens_g), where NLL_g is the negative
log-likelihood of the whole answer at level g, and tokens_g the number of image tokens that the language model reads.
A cost above 0 prefers cheaper levels that answer as well.

The semantic view is measured by default: it is where levels differ, and its NLL_g are those of the training objective
(Eq. 10), from one short pass per level. The tower runs once per distinct image of a batch.

Shapes: B rows, T prompt tokens, L answer tokens of the row with the most, I images, G levels.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from modeling_granulon import GranulonForConditionalGeneration, GranulonProcessor
from modeling_granulon.image_tokens import FULL, SEMANTIC
from modeling_granulon.joint_views import answer_tokens
from modeling_granulon.visual_output import GranulonVisualOutput

from .corpus import MEASURED, corpus_row, split_of
from .level_scores import mean_interval

COLUMNS = ("prompt", "completion", "images")
MEASURED_VIEWS = SEMANTIC, FULL
COPIED_COLUMNS = ("split", "kind", "phrasing")

logger = logging.getLogger(__name__)


def measure_rows(
    model: GranulonForConditionalGeneration,
    processor: GranulonProcessor,
    rows: Iterable[dict],
    batch_size: int = 8,
    temperature: float = 1.0,
    cost_per_token: float = 0.0,
    view: str = SEMANTIC,
) -> Iterator[dict]:
    """
    Corpus rows with soft labels, measured as the answers' likelihood under each level of the model.

    Args:
        rows: training rows (`prompt`, `completion`, `images`, as `load_rows` yields them) whose latest user turn is
            the question. Rows without images are skipped: no level changes their answer.
        batch_size: rows at a time.
        temperature: τ, above 0; higher is softer.
        cost_per_token: nats for every image token of a level.
        view: image tokens that are read, "semantic" or "full"; for "full" the tower runs once per level.

    Yields:
        dict: a row of corpus.py with `answer_nll` (nats) and `visual_tokens` by level, and `answer_tokens`; `split`,
        `kind` and `phrasing` are copied from the row; without a split it follows from the images.

    Raises:
        ValueError: no level to choose, a temperature that is not above 0, an unknown view, no rows, or a row without
            answer or columns.
        FloatingPointError: a likelihood that is not finite.
    """
    if len(model.config.granularities) < 2:
        raise ValueError(f"the model has the levels {model.config.granularity_names}; measuring needs two or more")
    if not (temperature > 0 and cost_per_token >= 0):
        raise ValueError(
            f"temperature is {temperature} and cost_per_token {cost_per_token}; expected above 0, and 0 or more"
        )
    if view not in MEASURED_VIEWS:
        raise ValueError(f"view is {view!r}; choose one of {MEASURED_VIEWS}")
    settings = {"temperature": temperature, "cost_per_token": cost_per_token, "view": view}
    return _measure_all(model.eval(), processor, rows, batch_size, settings)


def _measure_all(model, processor, rows, batch_size, settings: dict) -> Iterator[dict]:
    collator = DataCollatorForVisionLanguageModeling(processor.for_view(settings["view"]), completion_only_loss=True)
    numbered, read, without = enumerate(tqdm(rows, desc="measuring", leave=False, disable=None)), 0, 0
    while taken := list(islice(numbered, batch_size)):
        for number, row in taken:
            _check_columns(number, row)
        batch = [row for _, row in taken if row["images"]]
        read, without = read + len(taken), without + len(taken) - len(batch)
        if not batch:
            continue
        inputs = collator([{name: row[name] for name in COLUMNS} for row in batch])
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        nll_BG, answer_B, visual_BG = answer_nll(model, inputs, settings["view"])
        if not nll_BG.isfinite().all():
            raise FloatingPointError(
                f"the likelihood of an answer in rows {taken[0][0]} to {taken[-1][0]} is not finite: check their "
                "images, and use bfloat16 instead of float16"
            )
        probs_BG = (-nll_BG / settings["temperature"] - settings["cost_per_token"] * visual_BG).softmax(-1)
        for row, *measured in zip(batch, probs_BG, nll_BG, answer_B, visual_BG, strict=True):
            yield _corpus_row(model, processor, row, *measured, settings)
    if not read:
        raise ValueError("there are no rows to measure; expected rows with prompt, completion and images")
    if without:
        logger.warning(f"{without} of {read} rows have no image and were skipped: no level changes their answer")


@torch.no_grad()
def answer_nll(model, inputs: dict, view: str = SEMANTIC) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The answers' negative log-likelihood at every level.

    Args:
        inputs: `input_ids`, `attention_mask`, `labels` (B,T) and `pixel_values` (I,3,h,w), as the trainer's collator
            makes them.
        view: "semantic" or "full".

    Returns:
        NLL (B,G) in nats, summed over the answer; answer tokens (B,); image tokens shown (B,G). The NLL equals that of
        a forward pass with `granularity=` the level and `visual_view=` the view.
    """
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    index_BL, target_BL = answer_tokens(inputs["labels"])
    names = model.config.granularity_names
    if view == SEMANTIC:
        visual = _encode(model, inputs, every_level=True)
        visuals = [visual.at_level(level) for level in range(len(names))]
    else:  # a level's gain changes the pixel tokens too
        visuals = [_encode(model, inputs, granularity=name) for name in names]
        visual = visuals[0]
    passes = [model.model(**prompt, visual=seen, visual_view=view, predict=index_BL) for seen in visuals]
    states_BGLE = torch.stack([output.last_hidden_state for output in passes], dim=1)
    log_probs = model.lm_head(states_BGLE).float().log_softmax(-1)
    scored_BL = target_BL != -100
    target_BGL1 = target_BL.clamp_min(0)[:, None, :, None].expand(-1, len(names), -1, -1)
    nll_BG = -(log_probs.gather(-1, target_BGL1).squeeze(-1) * scored_BL.unsqueeze(1)).sum(-1)
    pixel = 0 if view == SEMANTIC else visual.cluster_map[0].numel()
    shown_G = torch.tensor([pixel + visual.used_tokens(level) for level in range(len(names))])
    return nll_BG, scored_BL.sum(-1), visual.images_per_row.unsqueeze(1) * shown_G.to(visual.images_per_row.device)


def _encode(model, inputs: dict, **levels) -> GranulonVisualOutput:
    """`model.encode` for the rows of a batch; an image that several rows show is encoded once."""
    placeholder_BT = model.model.placeholders(inputs["input_ids"], None)
    images_per_row = model.model.layout(placeholder_BT, inputs["pixel_values"]).images_per_row
    distinct, copy_I = _distinct(inputs["pixel_values"])
    visual = model.encode(inputs["pixel_values"][distinct], **levels)
    of_images = ("image_hidden_states", "semantic_mask", "cluster_map", "cluster_scores", "level_hidden_states")
    return GranulonVisualOutput.of(
        model.config,
        images_per_row=torch.tensor(images_per_row, device=visual.images_per_row.device),
        **{name: visual[name][copy_I] for name in of_images if name in visual},
    )


def _distinct(pixel_values: torch.Tensor) -> tuple[list[int], list[int]]:
    """Indices of the distinct images, and for each image the number of the distinct one that it equals."""
    places, copies = {}, []
    for place, image in enumerate(pixel_values):
        copies.append(places.setdefault(image.cpu().numpy().tobytes(), (len(places), place))[0])
    return [place for _, place in places.values()], copies


def compare_levels(rows: Sequence[dict], chosen: Sequence[str], groups: Sequence[str] | None = None) -> dict:
    """
    The answers' loss at chosen levels, beside every fixed level and the best level of each row (the oracle).

    Args:
        rows: measured rows, from `measure_rows`.
        chosen: the level of each row, such as a controller's.
        groups: the bootstrap's group of each row, such as its image; by default every row is one.

    Returns:
        dict: mean NLL per answer (value, low, high) of `chosen`, of each level in `fixed`, and of `oracle`;
        `best_fixed`, the best level on these rows (chosen in hindsight, which favours it); `chosen_minus_best_fixed`,
        paired; `image_tokens`, the mean number at the chosen levels and at each fixed one; `shares` of the levels
        among the chosen ones and the oracle's.

    Raises:
        ValueError: no rows, rows that were not measured, or unknown levels.
    """
    if not rows or len(rows) != len(chosen):
        raise ValueError(f"{len(rows)} measured rows and {len(chosen)} chosen levels; expected equal numbers above 0")
    if not all("answer_nll" in row for row in rows):
        raise ValueError("a row has no answer_nll; expected rows from measure_rows")
    levels = list(rows[0]["answer_nll"])
    unknown = sorted(set(chosen) - set(levels))
    if unknown:
        raise ValueError(f"the chosen levels include {unknown}; the rows were measured at {levels}")
    groups = groups or [str(number) for number in range(len(rows))]
    nll_BG = np.array([[row["answer_nll"][name] for name in levels] for row in rows])
    shown_BG = np.array([[row["visual_tokens"][name] for name in levels] for row in rows])
    chosen_B, row_B = np.array([levels.index(name) for name in chosen]), np.arange(len(rows))
    best_fixed, best_B = int(nll_BG.mean(0).argmin()), nll_BG.argmin(1)
    chosen_nll_B = nll_BG[row_B, chosen_B]
    return {
        "rows": len(rows),
        "chosen": mean_interval(chosen_nll_B, groups),
        "fixed": {name: mean_interval(nll_BG[:, level], groups) for level, name in enumerate(levels)},
        "best_fixed": levels[best_fixed],
        "oracle": mean_interval(nll_BG.min(1), groups),
        "chosen_minus_best_fixed": mean_interval(chosen_nll_B - nll_BG[:, best_fixed], groups),
        "image_tokens": {
            "chosen": float(shown_BG[row_B, chosen_B].mean()),
            **{name: float(shown_BG[:, level].mean()) for level, name in enumerate(levels)},
        },
        "shares": {
            policy: {name: float((index_B == level).mean()) for level, name in enumerate(levels)}
            for policy, index_B in (("chosen", chosen_B), ("oracle", best_B))
        },
    }


def _corpus_row(model, processor, row, probs_G, nll_G, answer, visual_G, settings: dict) -> dict:
    names = model.config.granularity_names
    image_key = hashlib.sha256(b"".join(_pixels(image) for image in row["images"])).hexdigest()
    return corpus_row(
        _question(processor, row["prompt"]),
        dict(zip(names, probs_G.tolist(), strict=True)),
        MEASURED,
        key=f"{image_key}\n{_text(row['completion'][-1])}",
        annotator={"model": model.config._name_or_path, "prompt_sha": None, **settings},
        answer_nll=dict(zip(names, nll_G.tolist(), strict=True)),
        answer_tokens=int(answer),
        visual_tokens=dict(zip(names, visual_G.tolist(), strict=True)),
        image_sha=image_key[:16],
        **{"split": split_of(image_key)} | {name: row[name] for name in COPIED_COLUMNS if row.get(name)},
    )


def _question(processor: GranulonProcessor, prompt: list[dict]) -> str:
    """The latest user turn's text, without placeholders."""
    return processor.question(processor.apply_chat_template(prompt, add_generation_prompt=True))


def _text(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _pixels(image) -> bytes:
    """Size and pixels, which identify an image."""
    return repr(image.size).encode() + image.convert("RGB").tobytes()


def _check_columns(number: int, row: dict):
    missing = [name for name in COLUMNS if row.get(name) is None]
    if missing:
        raise ValueError(
            f"row {number} has no {', '.join(missing)}, only {sorted(row)}; expected rows as load_rows returns them"
        )
    if not row["completion"] or not _text(row["completion"][-1]).strip():
        raise ValueError(f"row {number} has no answer whose likelihood could be measured")
