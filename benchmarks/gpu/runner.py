"""Runs a part in a process group of its own, with a time limit, without network and without telemetry."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import rows
from benchmarks.gpu.parts import Part

DONE, SKIPPED, FAILED, KILLED = "done", "skipped", "failed", "out of time"

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 3.0
"""Between asking a part to end and killing its processes; within its limit."""

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
    # One device: nothing has to be found on a network, which may not be there.
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}
ON_CPU = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class Settings(NamedTuple):
    """Of all parts: the folder of the results, the device, and the sizes ("full" or "tiny")."""

    out: Path
    device: str
    size: str


class Result(NamedTuple):
    """What became of a part.

    Attributes:
        part: which.
        status: "done", "skipped", "failed" or "out of time".
        why: of a part that is not done.
        seconds: that it took.
        limit_s: that it had.
        rows: as its file has them.
    """

    part: Part
    status: str
    why: str = ""
    seconds: float = 0.0
    limit_s: float = 0.0
    rows: tuple[dict[str, Any], ...] = ()


def skipped(part: Part, lacking: list[str]) -> Result:
    """A part that cannot run here."""
    return Result(part, SKIPPED, f"missing package: {', '.join(lacking)}")


@contextmanager
def caches() -> Iterator[dict[str, str]]:
    """The parts' environment; within it, compiled kernels are kept in one folder for all of them."""
    with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as folder:
        names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "PREFECT_HOME")
        yield {**os.environ, **OFFLINE, **{name: str(Path(folder, name.lower())) for name in names}}


def run(
    part: Part,
    settings: Settings,
    limit_s: float,
    environment: dict[str, str],
    on_row: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Result:
    """Run one part. Its output goes to OUT/<name>.log, its rows to OUT/<name>.jsonl.

    Args:
        part: which.
        settings: of all parts.
        limit_s: after this, its process group is killed; the rows that it has stay.
        environment: as `caches` gives it.
        on_row: called with each row as it appears.
    """
    path = settings.out / f"{part.name}.jsonl"
    log = settings.out / f"{part.name}.log"
    path.unlink(missing_ok=True)
    command = command_of(part, settings, limit_s - GRACE_S)
    if settings.device == "cpu":
        environment = {**environment, **ON_CPU}
    start = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    seen = 0
    try:
        while True:
            code = process.poll()
            found = rows.read(path)
            for row in found[seen:]:
                on_row(row)
            seen = len(found)
            if code is not None or time.monotonic() - start > limit_s - GRACE_S:
                break
            time.sleep(0.1)
    finally:  # also when the user interrupts
        _end(process)
    found = rows.read(path)  # one more may have come before the end
    for row in found[seen:]:
        on_row(row)
    status, why = _verdict(code, limit_s, log, len(found))
    return Result(part, status, why, time.monotonic() - start, limit_s, tuple(found))


def command_of(part: Part, settings: Settings, limit_s: float) -> list[str]:
    """What runs a part, and tells it how long it may take."""
    command = [sys.executable, "-m", "benchmarks.gpu.child", part.name, "--out", str(settings.out.absolute())]
    return [*command, "--device", settings.device, "--size", settings.size, "--limit-s", str(limit_s)]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the group, whose leader may have left others behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
            if number == signal.SIGTERM and not _lives(process.pid):
                return


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _verdict(code: int | None, limit_s: float, log: Path, num_rows: int) -> tuple[str, str]:
    if code is None:
        return KILLED, f"killed after {limit_s - GRACE_S:.0f} s with {num_rows} rows"
    if code == 0:
        return DONE, ""
    lines = log.read_text(errors="replace").strip().splitlines()
    said = lines[-1][:200] if lines else "no output"
    return FAILED, f"{_exit(code)}; see {log.name}: {said}"


def _exit(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
