"""A part's results, in its file row by row as they are known, so that a killed part keeps what it has."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

DONE, SKIPPED, FAILED = "done", "skipped", "failed"


class Measured(NamedTuple):
    """What a row measured.

    Attributes:
        headline: the row in a few words, with its unit.
        numbers: by name, units in the names.
        roofline: as `Machine.roofline` gives it.
    """

    headline: str
    numbers: dict[str, Any]
    roofline: dict[str, Any]


class Rows:
    """Appends rows to a file, each flushed to disk, and keeps an eye on the time.

    Args:
        path: the part's file.
        limit_s: seconds from `start` after which the part is killed.
        start: `time.monotonic()` when the part began.
    """

    def __init__(self, path: Path, limit_s: float, start: float | None = None):
        self.path, self.limit_s = path, limit_s
        self.start = time.monotonic() if start is None else start

    def left_s(self) -> float:
        """Seconds until the part is killed."""
        return self.limit_s - (time.monotonic() - self.start)

    def measure(self, name: str, work: Callable[[], Measured], needs_s: float = 2.0) -> bool:
        """Run one measurement and write its row, whatever happens.

        Args:
            name: of the row.
            work: measures.
            needs_s: with less time left than this, the row is skipped.

        Returns:
            Whether it was measured. Not if it fails or runs out of memory: then the next rows can still run.
        """
        if self.left_s() < needs_s:
            self.skip(name, f"{max(0, self.left_s()):.0f} s left, about {needs_s:.0f} s needed")
            return False
        begun = time.monotonic()
        found, why = None, ""
        try:
            found = work()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other rows are wanted
            traceback.print_exc()
            memory = "OutOfMemory" in type(error).__name__
            first = (str(error).strip().splitlines() or [""])[0]
            why = "out of memory" if memory else f"{type(error).__name__}: {first}"[:300]
        if found is None:  # only here is what the error held no longer in use
            self._add(name, FAILED, why)
            free()
            return False
        row = {"headline": found.headline, "numbers": found.numbers, "roofline": found.roofline}
        self._add(name, DONE, "", row | {"took_s": time.monotonic() - begun})
        return True

    def skip(self, name: str, why: str) -> None:
        """A row that is not measured, and why."""
        self._add(name, SKIPPED, why)

    def _add(self, name: str, status: str, why: str, more: dict[str, Any] | None = None) -> None:
        row = {"row": name, "status": status, "why": why, **(more or {})}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def free() -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
