"""Every name that was changed, with the version from which the old one is no longer understood.

An old name still works until then, and a warning says the new one. Names that lie on disk (columns, events,
manifests, review files) and whatever enters a digest are a format: they are not renamed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


class RenamedWarning(FutureWarning):
    """An old name was used; the message says the new one."""


@dataclass(frozen=True)
class Renamed:
    """One renamed thing.

    Attributes:
        where: the class of the configuration that has the key, or "command" or "option".
        old: the name until now; an option is written with its command, as `profile --scenes`.
        new: the name to use; of an option, with its command as well where that was renamed too.
        until: the first version that does not know the old name.
        values: old value -> new value, where values were renamed too.
        place: where in the file the key stands, for a name that stands elsewhere, too, and stays there.
    """

    where: str
    old: str
    new: str
    until: str = "0.4"
    values: dict[str, str] = field(default_factory=dict)
    place: str = ""


RENAMED: tuple[Renamed, ...] = (
    Renamed("CoconutOptions", "licence", "license"),
    Renamed("Sa1bOptions", "licence", "license"),
    Renamed("DecodeOptions", "length", "max_new_tokens"),
    Renamed("Evaluation", "length", "max_new_tokens"),
    Renamed("ProfileConfig", "lengths", "max_new_tokens"),
    Renamed("ProfileConfig", "scenes", "corpus"),
    Renamed("option", "caption --length", "caption --max-new-tokens"),
    Renamed("option", "profile --length", "profile --max-new-tokens"),
    Renamed("option", "profile --scenes", "profile --corpus"),
    Renamed("command", "plan", "estimate"),
    Renamed("option", "plan --corpus", "estimate --sources"),
    Renamed("TrainConfig", "accumulation", "gradient_accumulation_steps"),
    Renamed("TrainConfig", "warmup", "warmup_ratio"),
    Renamed("TrainConfig", "final_rate", "min_lr_ratio"),
    Renamed("TrainConfig", "clip", "max_grad_norm"),
    Renamed("TrainConfig", "average", "ema_decay"),
    Renamed("TrainConfig", "recompute", "activation_checkpointing"),
    Renamed("CorpusSource", "out", "corpus", place="corpora"),
    Renamed("DataOptions", "caption_slots", "max_new_tokens"),
    Renamed("NoiseOptions", "lowest", "eps"),
    Renamed("NoiseOptions", "weighting", "loss_weighting", values={"inverse": "1/t"}),
    Renamed("Evaluation", "out", "corpus", place="evaluation"),
)


def translate(where: str, values: dict[str, Any], quiet: bool = False) -> dict[str, Any]:
    """The mapping with its old keys replaced, and a `RenamedWarning` for each.

    Args:
        where: the class of the configuration that is being read.
        values: keys and values as they were given.
        quiet: give no warning.

    Raises:
        ValueError: a key is given under both names.
    """
    for each in _of(where):
        if each.old not in values:
            continue
        if each.new != each.old and each.new in values:
            raise ValueError(f"`{each.new}` and its old name `{each.old}` are both given; keep `{each.new}`")
        value = values[each.old]
        changed = each.values.get(value, value) if isinstance(value, str) else value
        if each.new == each.old and changed == value:
            continue
        values = {(each.new if name == each.old else name): given for name, given in values.items()}
        values[each.new] = changed
        if not quiet:
            warn(each, value, changed)
    return values


def translate_command_line(words: list[str]) -> list[str]:
    """A command line with its old commands and options replaced, and a `RenamedWarning` for each.

    Args:
        words: what follows `paracaption`.
    """
    given, words = words, list(words)
    for each in _of("command"):
        old = each.old.split()
        if words[: len(old)] == old:
            words[: len(old)] = each.new.split()
            warn(each)
    for each in _of("option"):
        *command, old = each.old.split()
        if command not in (given[: len(command)], words[: len(command)]):
            continue
        new = each.new.split()[-1]
        found = [n for n, word in enumerate(words) if word.partition("=")[0] == old]
        for n in found:
            words[n] = new + words[n].removeprefix(old)
        if found:
            warn(each)
    return words


def warn(renamed: Renamed, value: object = None, changed: object = None) -> None:
    """Say the new name, and the new value if that has changed too."""
    old, new = renamed.old, renamed.new
    if value != changed:
        old, new = f"{old}: {value}", f"{new}: {changed}"
    inside = f"in `{renamed.place}`, " if renamed.place else ""
    warnings.warn(
        f"{inside}`{old}` is now `{new}`; paracaption {renamed.until} will not know the old name",
        RenamedWarning,
        stacklevel=2,
    )


def _of(where: str) -> Iterator[Renamed]:
    return (each for each in RENAMED if each.where == where)
