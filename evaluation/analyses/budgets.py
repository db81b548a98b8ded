"""Accuracy and time of an answer against the image tokens that are read, beside other methods of token reduction.

One checkpoint, as it was trained: every method's tokens pass the same projector with the places of their patches, and
the same language model reads them. Time is that of a whole answer to one question, tower included.

Shapes: N rows, G levels.
"""

from contextlib import contextmanager, nullcontext
from itertools import cycle

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from tqdm import tqdm

from granulon.evaluation.statistics import mean_and_interval
from granulon.evaluation.timing import interleaved, quartiles
from granulon.evaluation.token_reduction import METHODS, SMALLER, fastv_answer, nearest_level, replaced, small_grid
from granulon.hub.inference import encode, generate, open_image, question_about
from granulon.hub.text import exact_match, markdown_table, with_interval
from modeling_granulon.image_tokens import FULL, PIXEL, SEMANTIC
from modeling_granulon.vision_features import patch_size_of

from .files import COLOURS, MARKERS

BUDGETS = (5, 10, 20, 64)  # image tokens
SPEED = "tokens_per_second"
OURS, FASTV = "Granulon", "FastV"
BATCH, NEW_TOKENS, TIMED_ROWS, TIMED_TOKENS = 16, 16, 8, 16


def accuracy_at_budgets(model, processor, rows: list[dict], budgets=BUDGETS, timed_rows: int = TIMED_ROWS) -> dict:
    """
    Every method at every budget, the model's own levels, the controller's choice and the best level of each question.

    Args:
        rows: with `image`, `question` and `answer`.

    Returns:
        dict: `rows` and `entries`, each with `method`, `budget`, `tokens` (that are read, mean), `accuracy` (value,
        low, high; exact match) and, except for the best level, `first_token_ms` and `tokens_per_second` (median and
        quartiles over questions).

    Raises:
        ValueError: a model without levels, rows without answers.
    """
    if not model.config.granularities:
        raise ValueError("the model has no levels of granularity; take one whose semantic tokens can be replaced")
    rows = [row for row in rows if row.get("answer")]
    if not rows:
        raise ValueError("no row has an answer; give questions with answers")
    settings = list(_settings(model, budgets))
    right, read = {}, {}
    for key in tqdm(settings, desc="accuracy", disable=None):
        said, read[key] = _answers(model, processor, rows, *key)
        right[key] = np.array([exact_match(answer, row["answer"]) for answer, row in zip(said, rows, strict=True)])
    seconds = _seconds(model, processor, rows[:timed_rows], settings)
    entries = []
    for key in settings:
        method, level, budget = key
        first_R, whole_R = (seconds[key, tokens] for tokens in (1, TIMED_TOKENS))
        speed_R = (TIMED_TOKENS - 1) / (whole_R - first_R).clip(1e-9)
        entries.append(
            {
                "method": method, "level": level, "budget": budget, "tokens": float(np.mean(read[key])),
                "accuracy": mean_and_interval(right[key]), "first_token_ms": quartiles(1000 * first_R),
                SPEED: quartiles(speed_R),
            }
        )  # fmt: skip
    levels = [right[OURS, name, None] for name in model.config.granularity_names]
    entries.append(
        {"method": OURS, "level": "best of each question", "budget": None, "tokens": None}
        | {"accuracy": mean_and_interval(np.max(levels, axis=0)), "first_token_ms": None, SPEED: None}
    )
    return {"rows": len(rows), "timed_rows": timed_rows, "threads": torch.get_num_threads(), "entries": entries}


def _settings(model, budgets):
    """(method, level or view, budget) of everything that is measured; budget None for the model as it is."""
    for name in ("auto", *model.config.granularity_names, PIXEL, FULL):
        yield OURS, name, None
    keeps = [entry["keep"] for entry in model.config.granularities]
    for budget in budgets:
        if budget not in keeps:
            yield OURS, None, budget
        for method in (*METHODS, FASTV):
            yield method, None, budget


@contextmanager
def _prepared(model, processor, method: str, budget: int | None):
    """The model with a method's tokens in place of its own; smaller images for the one that takes them."""
    size = processor.image_processor.size
    try:
        if method == SMALLER:
            height, width = (side * patch_size_of(model.config.vision_config) for side in small_grid(budget))
            processor.image_processor.size = {"height": height, "width": width}
        level = None if budget is None else nearest_level(model.config, budget)
        own = budget is None or method == FASTV
        with nullcontext() if own else replaced(model, processor, level, budget, None if method == OURS else method):
            yield level
    finally:
        processor.image_processor.size = size


def _view_and_level(model, name: str | None, level: int | None) -> tuple[str, int | str | None]:
    if name in (PIXEL, FULL):
        return name, None
    return SEMANTIC, level if name is None else None if name == "auto" else name


def _answers(
    model, processor, rows, method, name, budget, tokens=NEW_TOKENS, timed: bool = False
) -> tuple[list[str], list[int]]:
    """The greedy answers to rows, and the image tokens that each reads; of FastV those that its later layers read.

    Answers that are timed have exactly so many tokens, and what they read is not counted.
    """
    options = {"max_new_tokens": tokens, "do_sample": False} | ({"min_new_tokens": tokens} if timed else {})
    with _prepared(model, processor, method, budget) as level:
        view, granularity = _view_and_level(model, name, level)
        if method == FASTV:
            return [_fastv(model, processor, row, level, budget, tokens, timed) for row in rows], [budget] * len(rows)
        answers, read = [], []
        for start in range(0, len(rows), BATCH):
            chats = [question_about(open_image(row["image"]), row["question"]) for row in rows[start : start + BATCH]]
            prompt = encode(model, processor, chats, granularity)
            answers += generate(model, processor, prompt, visual_view=view, **options)[0]
            if not timed:
                read += [sum(row["tokens"].values()) for row in prompt.visual.describe(view)]
        return answers, read


def _fastv(model, processor, row, level, budget, tokens, timed) -> str:
    image = open_image(row["image"])
    text = processor.apply_chat_template(
        question_about(image, row["question"]), add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=text, images=[image], visual_view=PIXEL, return_tensors="pt")
    inputs = dict(inputs.to(model.device, dtype=model.dtype))
    ends = model.generation_config.eos_token_id
    ends = () if timed or ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
    ids = fastv_answer(model, inputs | {"granularity": level}, budget, tokens, ends)
    return processor.decode(ids, skip_special_tokens=True).strip()


def _seconds(model, processor, rows, settings) -> dict:
    """Seconds of answers of one token and of several to single questions, by setting and number of tokens."""
    calls, rows = {}, [row | {"image": open_image(row["image"])} for row in rows]  # before the time is taken
    for key in settings:
        for tokens in (1, TIMED_TOKENS):
            turn = cycle(rows)
            calls[key, tokens] = lambda key=key, tokens=tokens, turn=turn: _answers(
                model, processor, [next(turn)], *key, tokens=tokens, timed=True
            )
    return interleaved(calls, len(rows), model.device)


def budgets_markdown(report: dict) -> str:
    """A table with a line for every method at every budget."""
    lines = []
    for entry in report["entries"]:
        name = entry["method"] if entry["level"] is None else f"{entry['method']}, {entry['level']}"
        tokens = "" if entry["tokens"] is None else f"{entry['tokens']:.1f}"
        timed = [with_interval(*entry[key], digits=0) if entry[key] else "" for key in ("first_token_ms", SPEED)]
        lines.append([name, tokens, with_interval(*entry["accuracy"]), *timed])
    note = (
        f"Exact match of greedy answers to {report['rows']} questions with 95 % intervals; time as median and "
        f"quartiles over {report['timed_rows']} questions, one at a time, tower included, {report['threads']} threads."
    )
    header = ["method", "image tokens", "accuracy", "first token (ms)", "tokens/s"]
    return f"{note}\n\n{markdown_table(header, lines)}"


def draw_budgets(report: dict) -> Figure:
    """Accuracy against tokens and against the time to the first token; what nothing beats in both is ringed."""
    entries = [
        entry | {"first_token_ms": entry["first_token_ms"][0]}
        for entry in report["entries"]
        if entry["tokens"] is not None
    ]
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    for axes, key, title in zip(panels, ("tokens", "first_token_ms"), ("image tokens", "time to first token (ms)")):
        for number, method in enumerate(methods):
            own = [entry for entry in entries if entry["method"] == method]
            colour, marker = number % len(COLOURS), (number + number // len(COLOURS)) % len(MARKERS)
            style = {"color": COLOURS[colour], "marker": MARKERS[marker]}
            values = [entry["accuracy"][0] for entry in own]
            axes.plot([entry[key] for entry in own], values, linestyle="", label=method, markersize=5, **style)
        best = -1.0
        for entry in sorted(entries, key=lambda entry: (entry[key], -entry["accuracy"][0])):
            if entry["accuracy"][0] > best:
                best = entry["accuracy"][0]
                axes.plot(entry[key], best, "o", markersize=11, fillstyle="none", color=COLOURS[6], linewidth=0.8)
        axes.set_xlabel(title, fontsize=9)
        axes.set_xscale("log")
        axes.xaxis.set(
            major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter()
        )
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure
