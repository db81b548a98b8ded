"""Means over many steps and processes: sums stay on the device until they are logged."""

import resource

import torch


class Meter:
    """Named means, each a sum and a count; both are reduced over all processes when the means are read.

    names: all that will ever be added, the same on every process.
    """

    def __init__(self, names: list[str], device: torch.device):
        self.place = {name: number for number, name in enumerate(names)}
        self.totals_N2 = torch.zeros(
            len(names), 2, device=device, dtype=torch.float64 if device.type != "mps" else None
        )

    def add(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float):
        """Add to the sum and to the count of a name; neither waits for the device."""
        pair = torch.stack([torch.as_tensor(x, device=self.totals_N2.device).detach() for x in (total, count)])
        self.totals_N2[self.place[name]] += pair.to(self.totals_N2.dtype)

    def read(self, accelerator) -> dict[str, float]:
        """The means of what was added since the last reading; names without a count are left out."""
        totals = accelerator.reduce(self.totals_N2, reduction="sum").tolist()
        self.totals_N2.zero_()
        return {name: totals[n][0] / totals[n][1] for name, n in self.place.items() if totals[n][1] > 0}


def peak_memory_gb(device: torch.device) -> float:
    """The most memory in use so far: of the GPU, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def peak_flops(device: torch.device) -> float | None:
    """Operations per second in bfloat16 that the GPU is made for; None where there is none."""
    if device.type != "cuda":
        return None
    from torch._inductor.utils import get_device_tflops  # imports Triton

    return get_device_tflops(torch.bfloat16) * 1e12
