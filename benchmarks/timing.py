"""Interleaved timing and Markdown tables, shared by the benchmarks."""

import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from tqdm import tqdm


def interleaved(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    device: str | torch.device = "cpu",
    clock: Callable[[], float] = perf_counter,
) -> dict[str, float]:
    """Median seconds of each call. A round runs every call once, so that a busy spell of the machine hits them all.

    The first round warms up and is not counted. On CUDA each call is timed until the device is done. With
    `clock=time.process_time` and one thread, other programs on the machine take no part in the result.
    """
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    seconds = {name: [] for name in calls}
    for counted in tqdm([False] + [True] * rounds, desc="rounds", leave=False, disable=None):
        for name, call in calls.items():
            synchronize()
            start = clock()
            call()
            synchronize()
            if counted:
                seconds[name].append(clock() - start)
    return {name: median(values) for name, values in seconds.items()}


def machine(device: str = "cpu") -> str:
    """What the numbers were measured on, in one line."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        models = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
        name = models[0].split(":")[1].strip() if models else platform.processor() or platform.machine()
        name = f"{name}, threads: {torch.get_num_threads()}"
    return f"{name}, torch {torch.__version__}"


def milliseconds(seconds: float) -> str:
    """Three digits from a microsecond up: 0.123, 1.23, 12.3, 1234."""
    value = 1000 * seconds
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; the first column is text, the others are aligned to the right."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
