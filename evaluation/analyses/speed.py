"""Time and memory of an answer in each view and at each level, measured side by side.

A round answers one question in every setting, in random order (`evaluation/timing.py`); ratios to the full view are
taken within a round. Timed is `generate` on inputs that lie on the device: tower, controller, aggregation, prompt and
tokens, without preprocessing and decoding to text. All answers have the same number of tokens. An answer of one token
gives the time to the first token, and what a full answer takes beyond that gives the tokens per second.

Memory is the most bytes of tensors held at once during an answer, beyond weights and inputs.

Shapes: R rounds.
"""

from functools import partial
from itertools import cycle

import numpy as np
import torch
from matplotlib.figure import Figure

from granulon.evaluation.timing import interleaved, peak_bytes
from granulon.hub.inference import describe, encode, open_image, question_about
from granulon.hub.text import markdown_table
from modeling_granulon.image_tokens import FULL, SEMANTIC, VISUAL_VIEWS

from .files import COLOURS, FAINT

WARM_UP = 2  # rounds
NEW_TOKENS = 32


def measure_speed(model, processor, rows: list[dict], new_tokens: int = NEW_TOKENS) -> dict:
    """
    Time and memory of all views at the controller's level, and of the full and the semantic view at each level.

    Args:
        rows: with `image` and `question`; one round for each.
        new_tokens: of every answer, at least 2.

    Returns:
        dict: `device`, `dtype`, `threads`, `rounds`, `new_tokens` and `settings`, each with name, view, level (None
        for the controller's), `visual_tokens` (mean), `peak_mb`, and as (median, quartile, quartile)
        `first_token_ms`, `tokens_per_second` and their ratios to the full view, `first_token_ratio`, `speed_ratio`.

    Raises:
        ValueError: a model without levels, no rows, or fewer than 2 new tokens.
    """
    if not model.config.granularities:
        raise ValueError("the model has no levels of granularity, so there is only one view to measure")
    if not rows or new_tokens < 2:
        raise ValueError(f"there are {len(rows)} rows and new_tokens is {new_tokens}; at least 1 and 2 are needed")
    settings = {view: (view, None) for view in VISUAL_VIEWS}
    settings |= {
        f"{level}, {view}": (view, level) for level in model.config.granularity_names for view in (FULL, SEMANTIC)
    }
    conversations = [question_about(open_image(row["image"]), row["question"]) for row in rows]
    inputs = [encode(model, processor, [conversation]).inputs for conversation in conversations]
    calls = {
        (name, tokens): partial(_answer, model, cycle(inputs), view, level, tokens)
        for name, (view, level) in settings.items()
        for tokens in (1, new_tokens)
    }
    seconds = interleaved(calls, len(rows), model.device, warm_up=WARM_UP)
    first = {name: seconds[name, 1] for name in settings}
    speed = {name: (new_tokens - 1) / (seconds[name, new_tokens] - first[name]) for name in settings}
    measured = [
        {
            "name": name,
            "view": view,
            "level": level,
            "visual_tokens": _visual_tokens(model, processor, conversations, view, level),
            "first_token_ms": _quartiles(1000 * first[name]),
            "tokens_per_second": _quartiles(speed[name]),
            "first_token_ratio": _quartiles(first[name] / first[FULL]),
            "speed_ratio": _quartiles(speed[name] / speed[FULL]),
            "peak_mb": peak_bytes(calls[name, new_tokens], model.device) / 1e6,
        }
        for name, (view, level) in settings.items()
    ]
    on_cuda = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(model.device) if on_cuda else "cpu",
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "rounds": len(rows),
        "new_tokens": new_tokens,
        "settings": measured,
    }


def _answer(model, questions, view: str, level: str | None, tokens: int):
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    model.generate(**next(questions), **length, granularity=level, visual_view=view, do_sample=False)


def _visual_tokens(model, processor, conversations: list, view: str, level: str | None) -> float:
    """The mean number of image tokens that are read."""
    seen = [describe(model, encode(model, processor, [chat], level), view)[0]["tokens"] for chat in conversations]
    return float(np.mean([tokens["pixel"] + tokens["semantic"] for tokens in seen]))


def _quartiles(values_R: np.ndarray) -> tuple[float, ...]:
    """Median and quartiles."""
    return tuple(map(float, np.percentile(values_R, (50, 25, 75))))


def speed_markdown(report: dict) -> str:
    """A table with a row for each view and level."""
    ratio = "of the full view's"
    header = ["view", "visual tokens", "first token (ms)", ratio, "tokens/s", ratio, "peak memory (MB)"]
    digits = {"first_token_ms": 1, "first_token_ratio": 2, "tokens_per_second": 1, "speed_ratio": 2}
    rows = [
        [
            setting["name"],
            f"{setting['visual_tokens']:.1f}",
            *("{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*setting[key], d=places) for key, places in digits.items()),
            f"{setting['peak_mb']:.1f}",
        ]
        for setting in report["settings"]
    ]
    note = (
        f"Medians of {report['rounds']} interleaved rounds [quartiles], ratios within a round. Device: "
        f"{report['device']}, {report['dtype']}, {report['threads']} threads; one question at a time, "
        f"{report['new_tokens']} tokens per answer. Memory: tensors held at once beyond weights and inputs."
    )
    return f"{note}\n\n{markdown_table(header, rows)}"


def draw_speed(report: dict) -> Figure:
    """Time to first token, tokens per second and memory of each setting, medians with quartiles."""
    settings = report["settings"]
    titles = {
        "first_token_ms": "time to first token (ms)",
        "tokens_per_second": "tokens per second",
        "peak_mb": "peak memory of an answer (MB)",
    }
    figure = Figure(figsize=(1.8 + 2.7 * len(titles), 1.3 + 0.3 * len(settings)), layout="constrained")
    panels = figure.subplots(1, len(titles), sharey=True)
    for axes, (key, title) in zip(panels, titles.items()):
        for height, setting in enumerate(settings):
            median, *quartiles = np.atleast_1d(setting[key])
            colour, marker = (COLOURS[0], "o") if setting["level"] is None else (COLOURS[1], "s")
            axes.plot(quartiles, [height] * len(quartiles), color=colour, linewidth=3, alpha=0.4)
            axes.plot(median, height, marker, color=colour, markersize=5.5)
        axes.axvline(np.atleast_1d(settings[0][key])[0], color=FAINT, linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize=9)
        axes.set_xlim(0, 1.06 * axes.get_xlim()[1])
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    names = [f"{setting['name']}  ({setting['visual_tokens']:.0f})" for setting in settings]
    panels[0].set_yticks(range(len(settings)), names, fontsize=8)
    panels[0].invert_yaxis()
    panels[0].set_ylabel("view (visual tokens)", fontsize=8)
    panels[0].plot([], [], "o", color=COLOURS[0], label="level chosen by the controller")
    panels[0].plot([], [], "s", color=COLOURS[1], label="level given")
    panels[0].plot([], [], ":", color=FAINT, label="the full view")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    measured_on = f"{report['rounds']} interleaved rounds, {report['device']}, {report['dtype']}"
    figure.suptitle(f"Cost of each view (median and quartiles of {measured_on})", fontsize=10)
    return figure
