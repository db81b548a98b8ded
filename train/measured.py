"""Measured labels: how likely a checkpoint finds the right answer when it reads the image at each level.

A person's label says what sounds coarse; the answer's likelihood says what helps. For a question, an answer and
images, p(g) ∝ exp(−NLL_g / τ − cost · tokens_g), where NLL_g is that of the whole answer with level g forced, and
tokens_g the image tokens that the language model then reads, so that a cost lets the cheapest level win that suffices.

The tower, which costs most, runs once per image, also where several rows of a batch show the same one. Its features
are aggregated at every level, and all levels of a batch go through the language model together.

Shapes: B rows, T prompt tokens, L answer tokens of the row with the most, I images, N patches, K semantic slots,
R image slots of a row, D vision width, E text width, G levels.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

from modeling_granulon import GranulonForConditionalGeneration, GranulonProcessor
from modeling_granulon.joint_views import hide_slots, kept_last, take
from modeling_granulon.vision_features import vision_features

from .corpus import MEASURED, corpus_row, split_of
from .level_scores import mean_interval
from .trainer import GranulonCollator, answer_tokens

COLUMNS = ("prompt", "completion", "images")
PASSED_ON = ("split", "kind", "phrasing")

logger = logging.getLogger(__name__)


def measure_rows(
    model: GranulonForConditionalGeneration,
    processor: GranulonProcessor,
    rows: Iterable[dict],
    batch_size: int = 8,
    temperature: float = 1.0,
    cost_per_token: float = 0.0,
) -> Iterator[dict]:
    """
    Corpus rows with soft labels, measured as the answers' likelihood under each level of the model.

    Args:
        rows: training rows (`prompt`, `completion`, `images`, as data.py yields them) whose latest user turn is the
            question. Rows without images are left out: no level changes their answer.
        batch_size: rows at a time; the language model sees batch_size times the number of levels.
        temperature: τ, above 0; the larger, the softer the labels.
        cost_per_token: in nats of the answer's likelihood, for every image token that a level shows.

    Yields:
        dict: a row of corpus.py with `answer_nll` (nats) and `visual_tokens` by level, and `answer_tokens`; `split`,
        `kind` and `phrasing` are the row's own, the split else that of its images.

    Raises:
        ValueError: no level to choose, a temperature that is not above 0, no rows, or a row without answer or columns.
        FloatingPointError: a likelihood that is not finite.
    """
    if len(model.config.granularities) < 2:
        raise ValueError(f"the model has the levels {model.config.granularity_names}; measuring needs two or more")
    if not (temperature > 0 and cost_per_token >= 0):
        raise ValueError(
            f"temperature is {temperature} and cost_per_token {cost_per_token}; expected above 0, and 0 or more"
        )
    return _measure_all(model.eval(), processor, rows, batch_size, temperature, cost_per_token)


def _measure_all(model, processor, rows, batch_size, temperature, cost_per_token) -> Iterator[dict]:
    collator = GranulonCollator(processor, completion_only_loss=True)
    numbered, seen, blind = enumerate(tqdm(rows, desc="measuring", leave=False, disable=None)), 0, 0
    while taken := list(islice(numbered, batch_size)):
        for number, row in taken:
            _check_columns(number, row)
        batch = [row for _, row in taken if row["images"]]
        seen, blind = seen + len(taken), blind + len(taken) - len(batch)
        if not batch:
            continue
        inputs = collator([{name: row[name] for name in COLUMNS} for row in batch])
        nll_BG, answer_B, visual_BG = answer_nll(model, {k: value.to(model.device) for k, value in inputs.items()})
        if not nll_BG.isfinite().all():
            raise FloatingPointError(
                f"an answer's likelihood is not finite in rows {taken[0][0]} to {taken[-1][0]}: look at their images, "
                "and use bfloat16 instead of float16"
            )
        probs_BG = (-nll_BG / temperature - cost_per_token * visual_BG).softmax(-1)
        settings = {"temperature": temperature, "cost_per_token": cost_per_token}
        for row, *measured in zip(batch, probs_BG, nll_BG, answer_B, visual_BG, strict=True):
            yield _corpus_row(model, processor, row, *measured, settings)
    if not seen:
        raise ValueError("there are no rows to measure; expected rows with prompt, completion and images")
    if blind:
        logger.warning(f"{blind} of {seen} rows have no image and were left out: no level changes their answer")


@torch.no_grad()
def answer_nll(model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The answers' negative log-likelihood at every level, from one pass of the tower.

    Args:
        inputs: `input_ids`, `attention_mask`, `labels` (B,T) and `pixel_values` (I,3,h,w), as the trainer's collator
            makes them.

    Returns:
        NLL (B,G) in nats, summed over the answer; answer tokens (B,); image tokens shown (B,G). The NLL equals that of
        a forward pass with `granularity=` the level.
    """
    base, levels = model.model, len(model.config.granularities)
    distinct, copy_I = _distinct(inputs["pixel_values"])
    pixel_values = inputs["pixel_values"][distinct]
    vision = vision_features(base.vision_tower, pixel_values, layer=model.config.vision_feature_layer)
    placeholder_BT = inputs["input_ids"] == model.config.image_token_id
    embeds_BRE, masks_BT, visual_B = zip(
        *(_image_slots(base, vision, copy_I, inputs, placeholder_BT, level) for level in range(levels)), strict=True
    )
    index_BL, target_BL = answer_tokens(inputs["labels"])
    # All levels as one batch, level after level: (B,...) -> (G*B,...)
    states = base(
        input_ids=inputs["input_ids"].repeat(levels, 1),
        attention_mask=torch.cat(masks_BT),
        image_embeds=torch.cat(embeds_BRE),
        predict=index_BL.repeat(levels, 1),
    ).last_hidden_state
    log_probs = model.lm_head(states).float().log_softmax(-1)
    scored_BL = target_BL != -100
    target = target_BL.clamp_min(0).repeat(levels, 1).unsqueeze(-1)
    nll = -(log_probs.gather(-1, target).squeeze(-1) * scored_BL.repeat(levels, 1)).sum(-1)
    return nll.unflatten(0, (levels, -1)).T, scored_BL.sum(-1), torch.stack(visual_B, dim=1)


def _image_slots(base, vision, copy_I: list[int], inputs: dict, placeholder_BT: torch.Tensor, level: int):
    """Image tokens (B,R,E) at a level, the attention mask with its holes (B,T), and how many tokens are seen (B,)."""
    images = len(vision.features)
    tokens_IKD, mask_IK, _, _ = base._aggregate(vision, [level] * images)
    weights_IG = torch.zeros(images, len(base.config.granularities), device=vision.features.device)
    weights_IG[:, level] = 1
    pixel_INE, semantic_IKE = base.multi_modal_projector(vision.features, tokens_IKD, weights_IG)
    order_IK = kept_last(mask_IK)
    tokens_ISE = torch.cat([pixel_INE, take(semantic_IKE, order_IK)], dim=1)  # S = N + K
    used_IS = torch.cat([mask_IK.new_ones(pixel_INE.shape[:2]), mask_IK.gather(1, order_IK)], dim=1)
    layout = base._layout(placeholder_BT, inputs["pixel_values"])
    visible_BR = used_IS[copy_I].flatten()[layout.index_BR] & (layout.role_BR > 0)
    mask_BT = hide_slots(inputs["attention_mask"], placeholder_BT, visible_BR)
    return tokens_ISE[copy_I].flatten(0, 1)[layout.index_BR], mask_BT, visible_BR.sum(-1)


def _distinct(pixel_values: torch.Tensor) -> tuple[list[int], list[int]]:
    """Places of the distinct images, and for each image the number of the distinct one that it equals."""
    places, copies = {}, []
    for place, image in enumerate(pixel_values):
        copies.append(places.setdefault(image.cpu().numpy().tobytes(), (len(places), place))[0])
    return [place for _, place in places.values()], copies


def compare_levels(rows: Sequence[dict], chosen: Sequence[str], groups: Sequence[str] | None = None) -> dict:
    """
    The answer loss that chosen levels reach, against the best fixed level and the best level of every single row.

    Args:
        rows: measured rows, from `measure_rows`.
        chosen: the level of each row, such as a controller's.
        groups: the unit of the bootstrap for each row, such as its image; by default each row is one.

    Returns:
        dict: mean NLL per answer (value, low, high) of `chosen`, of each level in `fixed`, of `oracle`; `best_fixed`,
        the level that is best in hindsight on these very rows, which favours it; `chosen_minus_best_fixed`, paired;
        `image_tokens`, the mean number shown by the chosen levels and by each fixed one; `shares` of the chosen and of
        the oracle's levels.

    Raises:
        ValueError: no rows, rows that were not measured, or levels that they do not know.
    """
    if not rows or len(rows) != len(chosen):
        raise ValueError(f"{len(rows)} measured rows and {len(chosen)} chosen levels; expected as many, and some")
    if not all("answer_nll" in row for row in rows):
        raise ValueError("a row has no answer_nll; expected rows from measure_rows")
    levels = list(rows[0]["answer_nll"])
    unknown = sorted(set(chosen) - set(levels))
    if unknown:
        raise ValueError(f"the chosen levels hold {unknown}; the rows were measured at {levels}")
    groups = groups or [str(number) for number in range(len(rows))]
    nll_BG = np.array([[row["answer_nll"][name] for name in levels] for row in rows])
    shown_BG = np.array([[row["visual_tokens"][name] for name in levels] for row in rows])
    chosen_B, every_B = np.array([levels.index(name) for name in chosen]), np.arange(len(rows))
    best_fixed, best_B = int(nll_BG.mean(0).argmin()), nll_BG.argmin(1)
    chosen_nll_B = nll_BG[every_B, chosen_B]
    return {
        "rows": len(rows),
        "chosen": mean_interval(chosen_nll_B, groups),
        "fixed": {name: mean_interval(nll_BG[:, level], groups) for level, name in enumerate(levels)},
        "best_fixed": levels[best_fixed],
        "oracle": mean_interval(nll_BG.min(1), groups),
        "chosen_minus_best_fixed": mean_interval(chosen_nll_B - nll_BG[:, best_fixed], groups),
        "image_tokens": {
            "chosen": float(shown_BG[every_B, chosen_B].mean()),
            **{name: float(shown_BG[:, level].mean()) for level, name in enumerate(levels)},
        },
        "shares": {
            who: {name: float((index_B == level).mean()) for level, name in enumerate(levels)}
            for who, index_B in (("chosen", chosen_B), ("oracle", best_B))
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
        **{"split": split_of(image_key)} | {name: row[name] for name in PASSED_ON if row.get(name)},
    )


def _question(processor: GranulonProcessor, prompt: list[dict]) -> str:
    """The latest user turn's text, without placeholders."""
    return processor.question(processor.apply_chat_template(prompt, add_generation_prompt=True))


def _text(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _pixels(image) -> bytes:
    """What tells images apart: size and pixels."""
    return repr(image.size).encode() + image.convert("RGB").tobytes()


def _check_columns(number: int, row: dict):
    missing = [name for name in COLUMNS if row.get(name) is None]
    if missing:
        raise ValueError(f"row {number} to be measured has no {missing}, only {sorted(row)}; see data.py for the form")
    if not row["completion"] or not _text(row["completion"][-1]).strip():
        raise ValueError(f"row {number} to be measured has no answer; its likelihood says nothing")
