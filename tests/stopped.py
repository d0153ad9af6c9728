"""Commands that are stopped by signals, and what they leave behind."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MARK = "PARACAPTION_TEST_MARK"
HEEDING_SIGNALS = ["env", "--default-signal=INT,HUP"]
"""Before a command: tests under nohup, or in the background of a script, ignore signals, and so would it.

Not a `preexec_fn`, which can wait forever for a lock that another thread held at the fork.
"""
IGNORING_INTERRUPTS = ["env", "--ignore-signal=INT"]


class Stopped(NamedTuple):
    code: int
    seconds: float
    out: str
    errors: str
    left: list[str]


def run_and_stop(
    command: list[str],
    signals: tuple[int, ...],
    after_s: float | None = None,
    *,
    to_all: bool = False,
    ignoring: bool = False,
) -> Stopped:
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [*(IGNORING_INTERRUPTS if ignoring else HEEDING_SIGNALS), *command],
        cwd=ROOT,
        env=os.environ | {MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        if after_s is None:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.communicate()
        else:
            time.sleep(after_s)
        start = time.monotonic()
        for number in signals:
            os.killpg(process.pid, number) if to_all else process.send_signal(number)
            time.sleep(0.1)
        out, errors = process.communicate(timeout=600)
        return Stopped(process.returncode, time.monotonic() - start, out, errors, _marked(mark))
    finally:
        process.kill()
        process.wait()


def _marked(mark: str) -> list[str]:
    """Command lines of the processes that inherited a mark. A killed one needs a moment to go."""
    for _ in range(50):
        left = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                    left.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:
                pass
        if not left:
            break
        time.sleep(0.02)
    return left
