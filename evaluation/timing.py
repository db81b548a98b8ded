"""Interleaved timing and peak memory of calls: the one harness, for `granulon-analyse budgets` and the benchmarks."""

import platform
from collections.abc import Callable
from pathlib import Path
from random import Random
from time import perf_counter

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm


def interleaved(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    device: str | torch.device = "cpu",
    clock: Callable[[], float] = perf_counter,
    warm_up: int = 1,
) -> dict[str, np.ndarray]:
    """
    Seconds of each call in each round, by name.

    A round makes every call once, in a random order, so that other load on the machine affects all of them equally.

    Args:
        rounds, warm_up: rounds that count, and rounds before them that do not.
        device: on CUDA each call is timed until the device has finished.
        clock: `time.process_time` with one thread leaves out the time of other programs.
    """
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    random, seconds = Random(0), {name: [] for name in calls}
    for number in tqdm(range(warm_up + rounds), desc="rounds", leave=False, disable=None):
        for name in random.sample(list(calls), len(calls)):
            synchronize()
            start = clock()
            calls[name]()
            synchronize()
            if number >= warm_up:
                seconds[name].append(clock() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def quartiles(values_R: np.ndarray) -> list[float]:
    """The median and the two quartiles."""
    return np.percentile(values_R, (50, 25, 75)).tolist()


def with_quartiles(values_R: np.ndarray, shown: Callable[[float], str] | None = None) -> str:
    """The median over rounds and, in brackets, the quartiles, as `shown`; by default seconds as milliseconds."""
    median, low, high = map(shown or milliseconds, quartiles(values_R))
    return f"{median} [{low}, {high}]"


def times(ratio: float) -> str:
    """A ratio with three digits: 0.123x, 1.23x, 12.3x, 123x."""
    return f"{ratio:.{3 if ratio < 1 else 2 if ratio < 10 else 1 if ratio < 100 else 0}f}x"


def peak_bytes(call: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """The most bytes of tensors that a call holds at once, its result included, beyond what was held before it."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def machine(device: str | torch.device = "cpu") -> str:
    """The hardware and the version of PyTorch, in one line."""
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
    return times(1000 * seconds)[:-1]
