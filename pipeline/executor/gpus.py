"""This machine's GPUs as NVIDIA's library reports them, and how busy the calls of a model keep them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

log = logging.getLogger(__name__)

SAMPLE_EVERY_S = 1.0
"""The driver itself averages over up to a second, so sampling more often would not tell more."""


MANY_POOLS = (
    "give each model a share of a GPU (`num_gpus: 0.5`), lower `concurrency`, or ask one model a pass: build "
    "first with a shorter recipe, then with the whole one and `num_gpus: 0` for the models that have "
    "answered (docs/recipes.md)"
)
"""What helps where the pools of a recipe hold more GPUs at once than there are."""


class Gpu(msgspec.Struct, frozen=True):
    """One GPU of this machine.

    Attributes:
        name: as the driver reports it, such as "NVIDIA H200".
        total_bytes: its memory.
        free_bytes: the part of its memory that no process uses now.
    """

    name: str
    total_bytes: int
    free_bytes: int


class Spent(msgspec.Struct, frozen=True):
    """What the calls to a model have taken.

    Attributes:
        busy_s: seconds inside the calls.
        gpu: mean GPU utilization during them, 0..1; None if it is not known.
    """

    busy_s: float
    gpu: float | None


def list_gpus() -> list[Gpu]:
    """The GPUs that this process may use; an empty list without a driver."""
    nvml = _start_nvml()
    found = []
    for handle in _device_handles(nvml):
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        found.append(Gpu(nvml.nvmlDeviceGetName(handle), int(memory.total), int(memory.free)))
    return found


class Meter:
    """Adds up the time inside the calls to one model, and samples its GPUs once a second during them.

    Args:
        has_gpu: whether the actor was given a GPU; if not, nothing is sampled and no thread runs.
    """

    def __init__(self, has_gpu: bool):
        self._busy_s = 0.0
        self._samples: list[float] = []
        self._inside = threading.Event()
        self._nvml: Any = _start_nvml() if has_gpu else None
        self._gpus = _device_handles(self._nvml)
        if self._gpus:
            threading.Thread(target=self._watch, daemon=True, name="gpu-meter").start()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Measure the block, which is a call to the model."""
        start = time.perf_counter()
        self._inside.set()
        try:
            yield
        finally:
            self._inside.clear()
            self._busy_s += time.perf_counter() - start

    def take(self) -> Spent:
        """What the calls since the last `take` have taken."""
        samples, self._samples = self._samples, []
        spent = Spent(self._busy_s, sum(samples) / len(samples) if samples else None)
        self._busy_s = 0.0
        return spent

    def _watch(self) -> None:
        while True:
            self._inside.wait()
            time.sleep(SAMPLE_EVERY_S)
            if not self._inside.is_set():
                continue
            try:
                used = [self._nvml.nvmlDeviceGetUtilizationRates(gpu).gpu for gpu in self._gpus]
            except self._nvml.NVMLError as error:  # a slice of a GPU (MIG) has no such number
                log.info("the GPU's utilization is not known: %s", error)
                return
            self._samples.append(sum(used) / len(used) / 100)


def _start_nvml() -> Any:
    """NVIDIA's management library, started; None without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _device_handles(nvml: Any) -> list[Any]:
    """The devices named by CUDA_VISIBLE_DEVICES, which Ray sets for its actors; all if it is not set."""
    if nvml is None:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        if visible is None:
            return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        return [
            nvml.nvmlDeviceGetHandleByIndex(int(name))
            if name.isdigit()
            else nvml.nvmlDeviceGetHandleByUUID(name)
            for name in visible.replace(" ", "").split(",")
            if name and name != "-1"
        ]
    except nvml.NVMLError as error:
        log.info("CUDA_VISIBLE_DEVICES=%s names a GPU that NVML does not know (%s)", visible, error)
        return []
