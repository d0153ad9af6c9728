"""The device: its peaks as published and as measured here, the roofline, and clocks that wait for the GPU."""

from __future__ import annotations

import json
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

PUBLISHED = (
    (r"\bH200\b", 989e12, 4.8e12),
    (r"\bH100 80GB HBM3\b", 989e12, 3.35e12),  # SXM
    (r"\bA100\b.*80GB", 312e12, 2.0e12),
)
"""Name, dense bfloat16 operations a second, bytes a second: the makers' datasheets."""

FILE = "machine.json"


class Peaks(NamedTuple):
    """Operations and bytes a second."""

    flops: float
    bandwidth: float


class Call(NamedTuple):
    """Work that cannot overlap with other calls: operations, and bytes that have to be read or written."""

    flop: float
    num_bytes: float = 0.0


class Machine(NamedTuple):
    """Where a part runs.

    Attributes:
        device: cuda or cpu.
        tiny: sizes for a dry run instead of the published ones.
        name: of the device.
        published: its peaks by the datasheet; None: not in our table.
        measured: a large product and a large copy here.
    """

    device: torch.device
    tiny: bool
    name: str
    published: Peaks | None
    measured: Peaks

    @property
    def dtype(self) -> torch.dtype:
        """In which models compute."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def roofline(self, calls: Sequence[Call], seconds: float) -> dict[str, Any]:
        """How far a time is from what the device allows.

        Args:
            calls: the work, call by call.
            seconds: that it took.

        Returns:
            `floor_s`, the sum over the calls of the slower of their arithmetic and their memory traffic at
            the peaks; `bound`, which of the two makes up more of it; `share`, the floor over the time;
            `measured_share`, the same with the peaks measured here.
        """
        peaks = self.published or self.measured
        floor_s = floor_of(calls, peaks)
        compute_s = sum(call.flop / peaks.flops for call in calls if _computes(call, peaks))
        return {
            "floor_s": floor_s,
            "bound": "compute" if compute_s >= floor_s / 2 else "memory",
            "share": floor_s / seconds,
            "measured_share": floor_of(calls, self.measured) / seconds,
        }


def floor_of(calls: Sequence[Call], peaks: Peaks) -> float:
    """Seconds that the calls take at least, one after the other."""
    return sum(max(call.flop / peaks.flops, call.num_bytes / peaks.bandwidth) for call in calls)


def _computes(call: Call, peaks: Peaks) -> bool:
    return call.flop / peaks.flops >= call.num_bytes / peaks.bandwidth


def open_machine(out: Path, device: str, tiny: bool) -> Machine:
    """The device, with its peaks from an earlier part, or measured now.

    Raises:
        RuntimeError: cuda is asked for, and torch sees no GPU.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda":
        torch.cuda.init()  # raises with the reason
    found = torch.device(kind)
    name = torch.cuda.get_device_name() if kind == "cuda" else "CPU"
    published = next((Peaks(*rates) for form, *rates in PUBLISHED if re.search(form, name)), None)
    path = out / FILE
    if path.exists():
        known = json.loads(path.read_text())
        if known["name"] == name:
            return Machine(found, tiny, name, published, Peaks(*known["measured"]))
    machine = Machine(found, tiny, name, published, measure_peaks(found, tiny))
    path.write_text(json.dumps(describe(machine), indent=1) + "\n")
    return machine


def describe(machine: Machine) -> dict[str, Any]:
    """For the report."""
    known: dict[str, Any] = {
        "name": machine.name,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
    }
    if machine.device.type == "cuda":
        known["memory_gb"] = torch.cuda.get_device_properties(machine.device).total_memory / 1e9
    known |= {"published": machine.published and list(machine.published), "measured": list(machine.measured)}
    return known


def measure_peaks(device: torch.device, tiny: bool) -> Peaks:
    """Rates of a product of large random matrices in bfloat16 (a CPU: float32), and of a large copy."""
    on_gpu = device.type == "cuda"
    side = 8192 if on_gpu and not tiny else 512
    dtype = torch.bfloat16 if on_gpu else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product_s = median_s(lambda: left @ right, device)
    source = torch.randn((1 << 30) if on_gpu and not tiny else (1 << 22), device=device)
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source), device)
    return Peaks(2 * side**3 / product_s, 2 * source.numel() * source.element_size() / copy_s)


def median_s(work: Callable[[], Any], device: torch.device, times: int = 10) -> float:
    """Median seconds of a call after three to warm up; on a GPU between events on its own clock."""
    for _ in range(3):
        work()
    if device.type != "cuda":
        return statistics.median(seconds_of(work, device)[0] for _ in range(times))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for start, end in pairs:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) / 1000 for start, end in pairs)


def seconds_of(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of one call until the GPU is done with it, and its result."""
    start = now(device)
    result = work()
    return now(device) - start, result


def now(device: torch.device) -> float:
    """A clock, read when the GPU has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def waits_of(work: Callable[[], Any], device: torch.device) -> int | None:
    """How often the host waits for a GPU in a call, as torch notices; None on a CPU.

    It notices reads of values, shapes that depend on values, and copies that wait, but no wait for an event.
    """
    if device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(each.message) for each in caught)


def forget_peak(device: torch.device) -> None:
    """Count the peak of the memory from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device: torch.device) -> float | None:
    """Most memory that tensors had at once since `forget_peak`; None on a CPU, which has no such count."""
    return torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None


def fill(module: torch.nn.Module, std: float = 0.02) -> None:
    """Draw all weights anew on their device: scales close to one, all else close to zero."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = parameter.ndim == 1 and not name.endswith("bias")
            parameter.normal_(1.0 if scale else 0.0, std)
