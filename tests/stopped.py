"""Commands that are stopped by signals, and what they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MARK = "PARACAPTION_TEST_MARK"


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
        command,
        cwd=ROOT,
        env=os.environ | {MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_ignore_interrupts if ignoring else heed_signals,
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


def heed_signals() -> None:
    """Before a child starts: tests in the background of a script, or under nohup, ignore signals."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
