"""GPUs as the driver's library sees them: which there are, and how busy they are while a model is asked."""

from __future__ import annotations

import importlib
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
"""The driver averages over its last sixth of a second to second; asking more often says no more."""


class Gpu(msgspec.Struct, frozen=True):
    """One GPU of this machine: its name, its memory in bytes, and what of it nobody uses now."""

    name: str
    total_bytes: int
    free_bytes: int


class Spent(msgspec.Struct, frozen=True):
    """Seconds inside model calls, and the GPU's mean utilisation (0..1) meanwhile; None if nobody can say."""

    busy_s: float
    gpu: float | None


def seen() -> list[Gpu]:
    """The GPUs that this process may use; none without a driver."""
    nvml = _nvml()
    found = []
    for handle in _handles(nvml):
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        name = nvml.nvmlDeviceGetName(handle)
        found.append(
            Gpu(name.decode() if isinstance(name, bytes) else name, int(memory.total), int(memory.free))
        )
    return found


class Meter:
    """Adds up the time inside the calls to one model, and samples its GPUs once a second meanwhile.

    Args:
        has_gpu: whether the actor was given one; without, nothing is sampled and no thread runs.
    """

    def __init__(self, has_gpu: bool):
        self._busy_s = 0.0
        self._samples: list[float] = []
        self._inside = threading.Event()
        self._nvml: Any = _nvml() if has_gpu else None
        self._gpus = _handles(self._nvml)
        if self._gpus:
            threading.Thread(target=self._watch, daemon=True, name="gpu-meter").start()

    @contextmanager
    def call(self) -> Iterator[None]:
        """The block is a call to the model."""
        start = time.perf_counter()
        self._inside.set()
        try:
            yield
        finally:
            self._inside.clear()
            self._busy_s += time.perf_counter() - start

    def take(self) -> Spent:
        """What was spent since the last `take`."""
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
                log.info("the GPU's utilisation is not known: %s", error)
                return
            self._samples.append(sum(used) / len(used) / 100)


def _nvml() -> Any:
    """NVIDIA's management library, started; None without a driver. Ray carries a copy of the module."""
    for name in ("pynvml", "ray._private.thirdparty.pynvml"):
        try:
            nvml = importlib.import_module(name)
        except ImportError:
            continue
        try:
            nvml.nvmlInit()
            return nvml
        except nvml.NVMLError:
            return None
    return None


def _handles(nvml: Any) -> list[Any]:
    """The devices named by CUDA_VISIBLE_DEVICES, which Ray sets for its actors; all without that."""
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
        log.info("CUDA_VISIBLE_DEVICES=%s: %s", visible, error)
        return []
