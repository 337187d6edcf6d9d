"""The clock and the memory of the machine that a benchmark runs on, CPU or CUDA."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from kblam_ray.errors import InputError

Result = TypeVar("Result")

FREE_SHARE = 0.8
"""Of the memory that is free, what a benchmark takes unless told otherwise."""


class Machine:
    """One device: how long calls take on it, and how much memory is free or was taken.

    Raises:
        InputError: there is no such device.
    """

    def __init__(self, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError(
                "torch sees no CUDA device", where="--device", help="add --plan to see what would be measured on one"
            )
        self.device = torch.device(device)

    @property
    def name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return _processor_name()

    def seconds(self, call: Callable[[], Result]) -> tuple[float, Result]:
        """How long a call takes, all it started on the device included, and what it returns."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)
            begin.record()
            result = call()
            end.record()
            torch.cuda.synchronize(self.device)
            return begin.elapsed_time(end) / 1_000, result
        started = time.perf_counter()
        result = call()
        return time.perf_counter() - started, result

    def forget_peak(self) -> None:
        """Begin to watch the peak of the device's memory anew."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int | None:
        """Most that tensors took on the device since `forget_peak`; None on the CPU, where nobody counts."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def free_bytes(self) -> int:
        """Memory that can be had on the device.

        Raises:
            InputError: this system does not say.
        """
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            return torch.cuda.mem_get_info(self.device)[0]
        return _free_host_bytes()

    def describe(self) -> dict[str, Any]:
        import transformers

        return {
            "device": self.device.type,
            "device_name": self.name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }


def peak_process_bytes() -> int:
    """Largest resident size of this process so far, on the host."""
    unit = 1 if sys.platform == "darwin" else 1_024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _free_host_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        raise InputError(
            "this system does not say how much memory is free", where="benchmark", help="give --max-memory-gb"
        ) from None
    free = next(int(line.split()[1]) * 1_024 for line in lines if line.startswith("MemAvailable:"))
    # A container may be allowed less than the machine has.
    group = Path("/sys/fs/cgroup")
    try:
        allowed, taken = (
            (group / name).read_text(encoding="utf-8").strip() for name in ("memory.max", "memory.current")
        )
    except OSError:
        return free
    return free if allowed == "max" else min(free, int(allowed) - int(taken))
