"""How long answers take and how much memory they need, view by view and level by level, side by side in one run.

A round answers one question in every way, in an order drawn for it; the first rounds warm up and are not counted. So a
busy spell of the machine hits all ways alike, and ratios to the full view are taken within a round.

What is timed is `generate` on inputs that lie on the device: tower, controller, aggregation, reading the prompt and
the first token ("time to first token"), then each token after it. Preprocessing and decoding to text are not in it.
Every answer has the same number of tokens, whatever the model would say.

Memory on CUDA is the allocator's peak during an answer, above what was allocated before it (weights and inputs). On a
CPU it is the peak of the resident memory of a process of its own, which loads the model and answers nothing else,
above what it held before the answer; where the system cannot begin a new peak (anything but Linux), loading may hide
it.
"""

import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from granulon.hub.ask import load_model, question_inputs

from .files import COLOURS, FAINT, opened, table

FULL = "full"
VIEWS = (FULL, "pixel", "semantic", "auto")
OF_LEVELS = (FULL, "semantic")  # views measured at each level
SPREAD = (50, 25, 75)  # per cent: median and quartiles
MEGABYTE = 1e6


@dataclass(frozen=True)
class Way:
    """A view, and a level in place of the controller's choice."""

    view: str
    level: str | None = None

    @property
    def name(self) -> str:
        return self.view if self.level is None else f"{self.level}, {self.view}"


def ways_of(config) -> list[Way]:
    """All views at the level that the question asks for, and each level's full and semantic view."""
    if not config.granularities:
        raise ValueError(
            "the model has no levels of granularity, so that it has one view alone; take one whose granularities are "
            "not empty"
        )
    levels = [Way(view, level) for level in config.granularity_names for view in OF_LEVELS]
    return [*(Way(view) for view in VIEWS), *levels]


class Clock(StoppingCriteria):
    """Notes when each token was there; stops nothing."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(now(input_ids.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def now(device: torch.device) -> float:
    """Seconds, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_speed(
    model, processor, rows: list[dict], *, rounds: int = 10, warm_up: int = 2, new_tokens: int = 32, folder=None
) -> dict:
    """
    Time and memory of every way to ask the model, one question at a time.

    Args:
        rows: with `image` and `question`; a round takes the next one, and begins anew after the last.
        rounds, warm_up: counted, and before them not counted.
        new_tokens: of every answer.
        folder: of the checkpoint, for the memory on a CPU; without it that is not measured there.

    Returns:
        dict: `device`, `dtype`, `threads`, `rounds`, `new_tokens`, `memory` (what was measured), and `ways`, each with
        name, view, level, `visual_tokens` (mean), `first_token_ms`, `tokens_per_second`, their ratios to the full view
        `first_token_ratio` and `speed_ratio`, each (median, quartile, quartile), and `peak_mb` or None.

    Raises:
        ValueError: a model without levels, no rows, or numbers that are too small.
    """
    ways = ways_of(model.config)
    if not rows or rounds < 1 or warm_up < 1 or new_tokens < 2:
        raise ValueError(
            f"there are {len(rows)} rows, rounds is {rounds}, warm_up {warm_up} and new_tokens {new_tokens}; at least "
            "1, 1, 1 and 2 are needed"
        )
    inputs = [question_inputs(model, processor, opened(row), row["question"]) for row in rows[: rounds + warm_up]]
    times_RW2, peaks_W = _timed(model, ways, inputs, rounds, warm_up, new_tokens)
    on_cuda = model.device.type == "cuda"
    if not on_cuda and folder is not None:
        peaks_W = [peak_memory_alone(folder, rows[0], way, new_tokens) for way in ways]
    return {
        "device": torch.cuda.get_device_name(model.device) if on_cuda else "cpu",
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "new_tokens": new_tokens,
        "memory": _what_memory(on_cuda, folder),
        "ways": _described(model, ways, inputs, times_RW2, peaks_W, new_tokens),
    }


def _what_memory(on_cuda: bool, folder) -> str:
    if on_cuda:
        return "peak of CUDA's allocator during an answer, above weights and inputs"
    if folder is None:
        return "not measured"
    return "peak resident memory of a process that loads the model and answers once, above what it held before"


def answer_once(model, inputs, way: Way, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    clock = Clock()
    start = now(model.device)
    model.generate(
        **inputs,
        granularity=way.level,
        visual_view=way.view,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return clock.times[0] - start, clock.times[-1] - clock.times[0]


def _timed(model, ways: list[Way], inputs: list, rounds: int, warm_up: int, new_tokens: int):
    """Seconds (R,W,2) of each round and way, and the peak bytes of each way on CUDA, else None."""
    times_RW2, on_cuda = np.zeros((warm_up + rounds, len(ways), 2)), model.device.type == "cuda"
    peaks_W = [0 if on_cuda else None for _ in ways]
    order = np.random.default_rng(0)  # one after another in turn would always put the same one first
    for number in tqdm(range(warm_up + rounds), desc="rounds", leave=False, disable=None):
        question = inputs[number % len(inputs)]
        for place in order.permutation(len(ways)):
            if on_cuda:
                torch.cuda.reset_peak_memory_stats(model.device)
                before = torch.cuda.memory_allocated(model.device)
            times_RW2[number, place] = answer_once(model, question, ways[place], new_tokens)
            if on_cuda and number >= warm_up:
                peaks_W[place] = max(peaks_W[place], torch.cuda.max_memory_allocated(model.device) - before)
    return times_RW2[warm_up:], peaks_W


def _described(model, ways: list[Way], inputs: list, times_RW2, peaks_W, new_tokens: int) -> list[dict]:
    first_RW, speed_RW = times_RW2[..., 0], (new_tokens - 1) / times_RW2[..., 1]
    full = ways.index(Way(FULL))
    return [
        {
            "name": way.name,
            **asdict(way),
            "visual_tokens": float(np.mean([visual_tokens(model, question, way) for question in inputs])),
            "first_token_ms": _spread(1000 * first_RW[:, place]),
            "tokens_per_second": _spread(speed_RW[:, place]),
            "first_token_ratio": _spread(first_RW[:, place] / first_RW[:, full]),
            "speed_ratio": _spread(speed_RW[:, place] / speed_RW[:, full]),
            "peak_mb": None if peaks_W[place] is None else peaks_W[place] / MEGABYTE,
        }
        for place, way in enumerate(ways)
    ]


def visual_tokens(model, inputs, way: Way) -> int:
    """Image tokens that are read of a prompt."""
    (row,) = model.explain(**inputs, granularity=way.level).describe(way.view)
    return sum(row["tokens"].values())


def _spread(values_R: np.ndarray) -> tuple[float, ...]:
    return tuple(map(float, np.percentile(values_R, SPREAD)))


def peak_memory_alone(folder: str | Path, row: dict, way: Way, new_tokens: int) -> int:
    """Bytes by which an answer raises the resident memory of a fresh process that holds the model."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_memory, str(folder), row, way, new_tokens).result()


def _peak_memory(folder: str, row: dict, way: Way, new_tokens: int) -> int:
    logging.disable_progress_bar()
    model, processor = load_model(folder)
    inputs = question_inputs(model, processor, opened(row), row["question"])
    before = _begin_peak()
    answer_once(model, inputs, way, new_tokens)
    return max(0, _peak() - before)


def _begin_peak() -> int:
    """Let the peak begin at what is held now, where the system can; bytes held, or the peak so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return _peak()


def _peak() -> int:
    """Bytes, the highest since it began."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def speed_markdown(report: dict) -> str:
    ratio = "of the full view's"
    header = ["asked", "visual tokens", "first token (ms)", ratio, "tokens/s", ratio, "peak memory (MB)"]
    lines = [
        [
            way["name"],
            f"{way['visual_tokens']:.1f}",
            _quartiles(way["first_token_ms"], 1),
            _quartiles(way["first_token_ratio"], 2),
            _quartiles(way["tokens_per_second"], 1),
            _quartiles(way["speed_ratio"], 2),
            "" if way["peak_mb"] is None else f"{way['peak_mb']:.1f}",
        ]
        for way in report["ways"]
    ]
    told = (
        f"Medians of {report['rounds']} interleaved rounds [quartiles], ratios within a round. Device: "
        f"{report['device']}, {report['dtype']}, {report['threads']} threads; one question at a time, "
        f"{report['new_tokens']} tokens to each answer. Memory: {report['memory']}."
    )
    return f"{told}\n\n{table(header, lines)}"


def _quartiles(values, digits: int) -> str:
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*values, d=digits)


def draw_speed(report: dict) -> Figure:
    """Time to first token, tokens per second and memory of each way, medians with quartiles."""
    ways = report["ways"]
    shown = [("first_token_ms", "time to first token (ms)"), ("tokens_per_second", "tokens per second")]
    if all(way["peak_mb"] is not None for way in ways):
        shown.append(("peak_mb", "peak memory of an answer (MB)"))
    figure = Figure(figsize=(1.8 + 2.7 * len(shown), 1.3 + 0.3 * len(ways)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True)
    for axes, (key, title) in zip(panels, shown):
        for line, way in enumerate(ways):
            values = way[key] if isinstance(way[key], tuple | list) else (way[key],)
            colour = COLOURS[0] if way["level"] is None else COLOURS[1]
            if len(values) == 3:
                axes.plot(values[1:], [line, line], color=colour, linewidth=3, alpha=0.4, solid_capstyle="butt")
            axes.plot(values[0], line, "o" if way["level"] is None else "s", color=colour, markersize=5.5)
        full = ways[0][key]
        axes.axvline(full[0] if isinstance(full, tuple | list) else full, color=FAINT, linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize=9)
        axes.set_xlim(0, 1.06 * axes.get_xlim()[1])
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    names = [f"{way['name']}  ({way['visual_tokens']:.0f})" for way in ways]
    panels[0].set_yticks(range(len(ways)), names, fontsize=8)
    panels[0].invert_yaxis()
    panels[0].set_ylabel("asked (visual tokens)", fontsize=8)
    panels[0].plot([], [], "o", color=COLOURS[0], label="level chosen by the controller")
    panels[0].plot([], [], "s", color=COLOURS[1], label="level given")
    panels[0].plot([], [], ":", color=FAINT, label="the full view's")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    counted = f"median and quartiles of {report['rounds']} interleaved rounds, {report['device']}, {report['dtype']}"
    figure.suptitle(f"Cost of each view ({counted})", fontsize=10)
    return figure
