"""Every error the project raises on purpose. The type says what the caller can do about it.

| type | whose fault | what happens |
| --- | --- | --- |
| `ConfigError` | the user's | shown as one line: file, record, fix; nothing has started |
| `BadRecord` | one record's | the record is dropped with `reason`, the rest goes on |
| `Retryable` | the machine's | tried again, then a drop (one record) or `StageFailed` (all of them) |
| `StageFailed` | the model's or the set-up's | the build stops; what is committed stays |
| `IntegrityError` | the disk's or ours | what was written is not what was promised |
"""

from __future__ import annotations

import re

from .plain import plain_detail
from .reasons import Reason
from .secrets import shorten

_LONGEST_TEXT = 200_000
"""Characters of an error's text that are looked through: a traceback of Ray has some thousands."""


class ParaCaptionError(Exception):
    """Base of all errors below; the command line prints its message without a traceback."""


class ConfigError(ParaCaptionError, ValueError):
    """The user's input cannot work: a wrong config, an unreadable annotation file, a missing folder."""


class BadRecord(ParaCaptionError):
    """One record is unusable. Raised by whoever finds out, turned into a `Drop` by the stage that called it.

    Args:
        reason: why, from the closed list of reasons.
        detail: names the file and the record, and the fix where there is one. It may quote a stranger: what
            no format can hold is escaped, and what is too long is cut.

    Raises:
        ValueError: there is no such reason.
    """

    def __init__(self, reason: Reason, detail: str):
        reason, detail = Reason(reason), plain_detail(detail)
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class Retryable(ParaCaptionError):
    """The same call may succeed later or elsewhere."""


class EngineLost(Retryable):
    """The model's engine died or stopped answering."""


class OutOfMemory(Retryable):
    """A batch did not fit; a smaller one may."""


class StageFailed(ParaCaptionError):
    """A stage fails on everything it is given: the model or its set-up is broken, not the data."""


class Fenced(ParaCaptionError):
    """Another driver has taken the corpus over while this one was paused; nothing is lost."""


class UnitsHeldBack(StageFailed):
    """The source of some units failed: they are not committed, everything else is."""


class Diverged(StageFailed):
    """Step after step of a training run was skipped on all ranks; another start would end the same way."""


class NothingToTrainOn(StageFailed):
    """A training run's data are left out, all of them or more than is allowed; a restart would end alike."""


class StageStalled(StageFailed):
    """A stage made no progress for the configured time; the message carries the worker's stack."""


class IntegrityError(ParaCaptionError):
    """Committed data does not match its manifest, or a resume would mix two plans.

    Its text is one line, whatever the library that met the damage has said.
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class BadSample(IntegrityError):
    """One sample to train on is unusable: its shard, its photo or a mask of it is damaged, or it is too long.

    Args:
        reason: a word to count by.
        detail: names the file and the record, and the fix.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def one_line(error: BaseException) -> str:
    """An error as one line: ours as it is, any other with its type and the line of its text that says most.

    Secrets in it are hidden.

    Ray and torch put pages of traceback into an error's text, in which the last line of the form `Error: ...`
    is the error itself. Without a traceback, the first line says most.
    """
    lines = [line.strip() for line in shorten(_text_of(error)).splitlines() if line.strip()]
    if isinstance(error, ParaCaptionError):
        return " ".join(lines)
    causes = [line for line in lines if re.match(r"(?!ray\.)[\w.]*(Error|Exception)\b.*:", line)]
    if not causes and not any(line.startswith('File "') for line in lines):
        lines = lines[:1]
    return plain_detail(f"{type(error).__name__}: {(causes or lines or [''])[-1]}")


def _text_of(error: BaseException) -> str:
    """Its text, or words in its place if it cannot be made; of a very long one its two ends."""
    try:
        text = str(error)
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - an error of a stranger's class
        return plain_detail(error)
    most = _LONGEST_TEXT // 2
    return text if len(text) <= _LONGEST_TEXT else f"{text[:most]}\n{text[-most:]}"


REBUILD = "delete this file and run `paracaption build CONFIG` again, which rebuilds its unit"
"""What to do about a damaged file of a committed unit, named before; a unit without it is rebuilt."""
