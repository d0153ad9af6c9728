"""Captions that another project's script wrote, in one of the forms in which such scripts write them.

| form | a region's caption |
| --- | --- |
| a JSON object (PerceptionDLM, GAR, DAM) | `"KEY": "caption"`; DAM's `query` is no region's |
| JSON lines (PixelRefer, a file for each GPU) | `{"id": "KEY", "pred": "caption"}` |
| JSON lines (answers of a batch) | `{"custom_id": "KEY", "response": {"body": {"choices": [...]}}}` |

A key is that of the benchmark. If the script read what `paracaption benchmark coco` wrote, it is the number
of an annotation there, and `keys` names the file that translates it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ...pipeline.io import weights
from ...pipeline.models.options import BackendOptions
from ...schemas.errors import ConfigError

FORMS = "a JSON object {key: caption}, or JSON lines with `id` and `pred`, or with `custom_id` and `response`"

_NOTES = frozenset({"query"})
"""Keys of a file that are no region's."""


class PredictionOptions(BackendOptions, frozen=True):
    """The options of `predictions`.

    Attributes:
        path: the file, or all files if a script wrote several.
        keys: a JSON object that translates the keys of the files into those of the benchmark, such as
            `keys.json` of `paracaption benchmark coco`; None if the files have the benchmark's keys.
    """

    path: str | list[str]
    keys: str | None = None

    def paths(self) -> list[Path]:
        """All files.

        Raises:
            ConfigError: one of them does not exist, or none is named.
        """
        every = [Path(each) for each in ([self.path] if isinstance(self.path, str) else self.path)]
        if not every:
            raise ConfigError("captioner.options.path: no file; name the file with the captions")
        return [_existing(path, "path") for path in every]

    def identity(self) -> dict[str, str]:
        """A digest of all files.

        Raises:
            ConfigError: a file does not exist.
        """
        digests = " ".join(weights.identity(path) for path in self.paths())
        keys = self.keys and {"keys": weights.identity(_existing(Path(self.keys), "keys"))}
        return {"predictions": digests} | (keys or {})


def _existing(path: Path, option: str) -> Path:
    if not path.is_file():
        what = "the keys.json of `benchmark coco`" if option == "keys" else "a file with captions by key"
        raise ConfigError(f"captioner.options.{option}: {path}: no such file; name {what}")
    return path


def read_predictions(options: PredictionOptions) -> dict[str, str]:
    """The captions by the benchmark's keys.

    Raises:
        ConfigError: a file is missing or in none of the forms, two lines contradict each other, or `keys`
            does not translate a key.
    """
    found: dict[str, str] = {}
    for path in options.paths():
        for key, caption in _captions(path):
            if found.setdefault(key, caption) != caption:
                raise ConfigError(f"{path}: two different captions for {key}; remove one of them")
    if options.keys is None:
        return found
    keys = _object(_existing(Path(options.keys), "keys"))
    if unknown := next((key for key in found if not isinstance(keys.get(key), str)), None):
        raise ConfigError(f"{options.keys}: has no key for {unknown}, which {options.path} captions")
    return {keys[key]: caption for key, caption in found.items()}


def check_keys(captions: dict[str, str], wanted: Sequence[str], options: PredictionOptions) -> None:
    """Refuse captions none of which is of a benchmark's region.

    Raises:
        ConfigError: the files have captions, and all are about something else.
    """
    if captions and not captions.keys() & set(wanted):
        raise ConfigError(
            f"captioner.options.path: {options.path}: no caption is of a region of this benchmark: keys "
            f"there are like {next(iter(captions))!r}, and the benchmark's like {wanted[0]!r}; name another "
            "file, or set `keys` to the keys.json that `paracaption benchmark coco` wrote. A file is "
            f"{FORMS}"
        )


def _captions(path: Path) -> Iterator[tuple[str, str]]:
    lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    if len(lines) > 1 and _is_object(lines[0]):
        for number, line in enumerate(lines, 1):
            yield from _line_captions(f"{path}: line {number}", _decoded(path, line, f"line {number}: "))
        return
    content = _object(path)
    if {"id", "pred"} <= content.keys() or "custom_id" in content:  # a single line
        yield from _line_captions(f"{path}: line 1", content)
        return
    yield from ((key, text) for key, text in content.items() if isinstance(text, str) and key not in _NOTES)


def _line_captions(where: str, line: Any) -> Iterator[tuple[str, str]]:
    """The caption of a line; nothing for a request that was refused."""
    try:
        if "custom_id" not in line:
            key, caption = str(line["id"]), line["pred"]
        else:
            body = (line.get("response") or {}).get("body") or {}
            if line.get("error") or not body.get("choices"):
                return
            key, caption = str(line["custom_id"]), body["choices"][0]["message"]["content"]
        if not isinstance(caption, str):
            raise TypeError(f"the caption of {key} is not a text")
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{where}: not {FORMS} ({error}); correct it") from error
    yield key, caption.strip()


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(line), dict)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return False


def _object(path: Path) -> dict[str, Any]:
    return _decoded(path, path.read_bytes())


def _decoded(path: Path, data: bytes, where: str = "") -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {where}not {FORMS} ({error}); correct it") from error
