"""The form of a recipe in a configuration: stages in order, by name or with options, and composites of them.

    recipe:
      - usable_masks                                              # a stage by its kind
      - {stage: caption, id: caption_gar, captioner: {name: gar}} # with an id and options of its own
      - vote: [verify_category, {stage: verify_category, id: strict, min_verdict_margin: 2}]
        id: agreed
        at_least: 2

Which kinds there are, and which options they take, is not known here: `pipeline.stages` knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .errors import ConfigError

COMPOSITES = ("vote", "fallback")
"""Keys that make an entry a composite: their value is the list of its members."""

MAX_DEPTH = 8
"""Composites in composites, which nobody needs more of."""

_RESERVED = ("source", "write")
_ID = re.compile(r"[a-z][a-z0-9_]{0,47}")


class StageEntry(NamedTuple):
    """One stage of a recipe.

    Attributes:
        kind: the name of one of our stages, or `module:Class` of the user's own.
        id: unique in the recipe.
        options: of the stage, as they are written.
    """

    kind: str
    id: str
    options: dict[str, Any] = {}


class CompositeEntry(NamedTuple):
    """A stage that asks other stages and decides from their verdicts.

    Attributes:
        kind: one of `COMPOSITES`.
        id: unique in the recipe.
        members: each is a sequence of entries; one that is a single entry is a sequence of one.
        at_least: of a vote: the number of members that have to keep a region.
    """

    kind: str
    id: str
    members: list[list[StageEntry | CompositeEntry]]
    at_least: int = 1


Entry = StageEntry | CompositeEntry


class EntryError(ConfigError):
    """An entry is malformed.

    Attributes:
        place: of the entry in the list, such as (2, "vote", 0).
        given: what is there.
        what: is wrong with it, and what to do.
    """

    def __init__(self, place: tuple[int | str, ...], given: Any, what: str):
        super().__init__(f"recipe.{'.'.join(map(str, place))}: {what}" if place else f"recipe: {what}")
        self.place, self.given, self.what = place, given, what


def parse(recipe: Sequence[Any]) -> list[Entry]:
    """The entries of a recipe that is a list.

    Raises:
        EntryError: an entry is no name and no mapping of the known form, or an id occurs twice.
    """
    if not recipe:
        raise EntryError((), [], "the list names no stage; `paracaption config --recipes` prints two recipes")
    taken: set[str] = set()
    return [_parse(each, (number,), taken) for number, each in enumerate(recipe)]


def plain(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The entries as a configuration has them, written out: `parse` reads them."""
    found: list[dict[str, Any]] = []
    for entry in entries:
        if isinstance(entry, StageEntry):
            found.append({"stage": entry.kind, "id": entry.id, **entry.options})
            continue
        members = [plain(each) for each in entry.members]
        listed = [each[0] if len(each) == 1 else each for each in members]
        at_least = {"at_least": entry.at_least} if entry.kind == "vote" else {}
        found.append({entry.kind: listed, "id": entry.id, **at_least})
    return found


def walk(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Every entry in the order in which they run: a composite comes after its members."""
    for entry in entries:
        if isinstance(entry, CompositeEntry):
            for member in entry.members:
                yield from walk(member)
        yield entry


def stages_in(entries: Sequence[Entry]) -> list[StageEntry]:
    """The stages alone, those in composites too, in the order in which they run."""
    return [each for each in walk(entries) if isinstance(each, StageEntry)]


def _parse(given: Any, place: tuple[int | str, ...], taken: set[str]) -> Entry:
    if isinstance(given, str):
        return StageEntry(given, _claim(_default_id(given, place), place, taken))
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise EntryError(
            place, given, "an entry is the name of a stage, or a mapping such as {stage: caption}"
        )
    kinds = [key for key in ("stage", *COMPOSITES) if key in given]
    if len(kinds) != 1:
        what = f"it has `{'` and `'.join(kinds)}`" if kinds else "it has none"
        raise EntryError(place, given, f"an entry has one of `stage`, `vote` and `fallback`; {what}")
    if kinds == ["stage"]:
        kind = given["stage"]
        if not isinstance(kind, str):
            raise EntryError((*place, "stage"), kind, "name the kind of the stage, as in `stage: caption`")
        name = given.get("id", _default_id(kind, place))
        options = {key: value for key, value in given.items() if key not in ("stage", "id")}
        return StageEntry(kind, _claim(name, (*place, "id"), taken), options)
    return _parse_composite(kinds[0], given, place, taken)


def _parse_composite(
    kind: str, given: dict[str, Any], place: tuple[int | str, ...], taken: set[str]
) -> CompositeEntry:
    if unknown := given.keys() - {kind, "id", *(["at_least"] if kind == "vote" else [])}:
        takes = "`vote`, `id` and `at_least`" if kind == "vote" else "`fallback` and `id`"
        raise EntryError((*place, min(unknown)), given[min(unknown)], f"unknown key; it takes {takes}")
    listed = given[kind]
    if not isinstance(listed, list) or len(listed) < 2:
        raise EntryError((*place, kind), listed, "list two members or more: stages, or lists of stages")
    if len(place) > 2 * MAX_DEPTH:
        raise EntryError(place, kind, "composites are nested too deeply; write a flatter recipe")
    members: list[list[Entry]] = []
    for number, each in enumerate(listed):
        at = (*place, kind, number)
        if isinstance(each, list) and not each:
            raise EntryError(at, each, "a member is a stage or a list of stages; this list is empty")
        steps = each if isinstance(each, list) else [each]
        places = [(*at, step) if isinstance(each, list) else at for step in range(len(steps))]
        members.append([_parse(step, there, taken) for step, there in zip(steps, places, strict=True)])
    at_least = given.get("at_least", len(members) // 2 + 1)
    if type(at_least) is not int or not 1 <= at_least <= len(members):
        raise EntryError(
            (*place, "at_least"), at_least, f"has to be a whole number from 1 to {len(members)}, its members"
        )
    name = _claim(given.get("id", kind), (*place, "id"), taken)
    return CompositeEntry(kind, name, members, at_least)


def _default_id(kind: str, place: tuple[int | str, ...]) -> str:
    """The kind's own name; of a class of the user's own its name in lower case, with underscores."""
    if ":" not in kind:
        return kind
    last = kind.rpartition(":")[2].rpartition(".")[2]
    found = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", last).lower()
    if not _ID.fullmatch(found):
        raise EntryError(place, kind, "no id can be made of the class's name; give it an `id`")
    return found


def _claim(name: Any, place: tuple[int | str, ...], taken: set[str]) -> str:
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise EntryError(
            place,
            name,
            "a stage's name or id has at most 48 lower-case letters, digits and `_`, a letter first",
        )
    if name in _RESERVED:
        raise EntryError(place, name, f"`{name}` is an end of every recipe; give the stage another `id`")
    if name in taken:
        raise EntryError(
            place, name, f"`{name}` is there twice; give each an `id` of its own, such as `id: {name}_2`"
        )
    taken.add(name)
    return name
