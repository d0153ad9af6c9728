"""Test backends with one property each: where they run, how they end, too little memory, a report."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from paracaption.pipeline.models.protocols import Answer, Checked, Question
from paracaption.schemas.errors import ConfigError, OutOfMemory
from paracaption.schemas.records import ImageRecord
from tests.backends import InstantCaptioner, InstantJudge


def _noted(path: str) -> None:
    with open(path, "a") as file:
        file.write(f"{os.getpid()} {os.environ.get('ONLY_HERE')} {os.environ.get('BY_PYTHON')}\n")


class WhereCaptioner(InstantCaptioner):
    """Writes down its process and the variables ONLY_HERE and BY_PYTHON."""

    def __init__(self, where: str, **options: Any):
        super().__init__(**options)
        _noted(where)


class WhereJudge(InstantJudge):
    def __init__(self, where: str, **options: Any):
        super().__init__(**options)
        _noted(where)


class ThreadCaptioner(InstantCaptioner):
    """Writes down in which process and thread each call runs."""

    def __init__(self, where: str, **options: Any):
        super().__init__(**options)
        self.where = where

    def caption(self, images: list[ImageRecord]) -> list[list[str | None]]:
        with open(self.where, "a") as file:
            file.write(f"{os.getpid()} {threading.get_ident()}\n")
        return super().caption(images)


class ClosedCaptioner(InstantCaptioner):
    """Writes down when it is loaded and when it is closed."""

    def __init__(self, seen: str, **options: Any):
        super().__init__(**options)
        self.seen = seen
        self._note("opened")

    def _note(self, what: str) -> None:
        with open(self.seen, "a") as file:
            file.write(f"{what}\n")

    def close(self) -> None:
        self._note("closed")


class SmallCaptioner(InstantCaptioner):
    """Has memory for `room` regions at once."""

    def __init__(self, room: int, log: str | None = None):
        super().__init__(log)
        self.room = room

    def caption(self, images: list[ImageRecord]) -> list[list[str | None]]:
        wanted = sum(len(image.live()) for image in images)
        if wanted > self.room:
            raise OutOfMemory(f"{wanted} regions, room for {self.room}")
        return super().caption(images)


class ReportingJudge(InstantJudge):
    """Counts its questions."""

    def __init__(self, broken: bool = False, log: str | None = None):
        super().__init__(log)
        self.asked, self.broken = 0, broken

    def ask(self, questions: list[Question]) -> list[Answer]:
        self.asked += len(questions)
        return super().ask(questions)

    def report(self) -> dict[str, float]:
        if self.broken:
            raise RuntimeError("no numbers today")
        return {"questions": float(self.asked)}


class WeighedCaptioner(InstantCaptioner):
    """Its check knows a weight, finds a folder, or does not."""

    def __init__(self, weight_gb: float = 1.0, path: str = "", engine: dict | None = None):
        super().__init__()

    @classmethod
    def check(cls, weight_gb: float = 1.0, path: str = "", engine: dict | None = None) -> Checked:
        if path and not os.path.isdir(path):
            raise ConfigError(f"captioner.options.path: {path}: no such folder; download it")
        return Checked("a weighed captioner", int(weight_gb * 1e9), ["its weights are made up"])


class SilentCaptioner(dict):
    """Does not say what it takes: `inspect` knows no signature of it, nor of an extension module's class."""

    def caption(self, images: list) -> list:
        return []


class HangingCaptioner(InstantCaptioner):
    """Hangs in a call; or makes its process hang in what comes later, as a file system does.

    Args:
        where: "call"; "filter", which runs after the captions; "output", when a ledger is flushed.
    """

    def __init__(self, where: str, **options: Any):
        super().__init__(**options)
        self.where = where

    def caption(self, images: list[ImageRecord]) -> list[list[str | None]]:
        from paracaption.pipeline.io import store
        from paracaption.pipeline.stages.text import CleanText

        if self.where == "call":
            time.sleep(3600)
        elif self.where == "filter":
            CleanText.decide = lambda *_: time.sleep(3600)  # type: ignore[method-assign]
        else:
            fsync = os.fsync

            def hang(descriptor: int) -> None:
                if "/ledger/" in os.readlink(f"/proc/self/fd/{descriptor}"):
                    time.sleep(3600)
                fsync(descriptor)

            store.os.fsync = hang  # type: ignore[attr-defined]
        return super().caption(images)


class KilledWhileSaving(InstantCaptioner):
    """Its process dies, once, while it saves what was answered.

    Args:
        mark: a file that is made then.
        at: "flush", before what was written is on the disk; "name", before the file gets its name.
    """

    def __init__(self, mark: str, at: str, **options: Any):
        super().__init__(**options)
        from paracaption.pipeline.io import store

        function = {"flush": "fsync", "name": "replace"}[at]
        usual = getattr(os, function)

        def die(what: Any, *rest: Any) -> None:
            path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
            if "/evidence/" in path and os.path.isfile(path) and not os.path.exists(mark):
                os.close(os.open(mark, os.O_CREAT))
                os.kill(os.getpid(), signal.SIGKILL)
            usual(what, *rest)

        setattr(store.os, function, die)
