"""A work list that grows: what its sources have today, next to what was planned before.

Units that were planned before keep their images and their order. New images make new units, after the old
ones. An image that is gone from its source stays in its unit. One that has changed stays there, too, and its
unit is built again. So nothing but a unit with a changed image is touched, whatever comes or goes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ...schemas.errors import IntegrityError
from ...schemas.reasons import ERRORS, Reason
from ...schemas.records import Drop
from ...schemas.strict import is_location
from ..io.activity import NOW
from ..sources.protocols import SOURCE_STAGE, CatalogEntry
from ..sources.registry import find_options, option_texts
from . import work_list_table
from .work_list_summary import Step, WorkList, first_steps
from .work_list_table import UnitReader

EXAMPLES = 5

GONE = Drop(SOURCE_STAGE, Reason.GONE, "not in the source any more")


class Growth(NamedTuple):
    """What is different in the sources since a work list was made.

    Attributes:
        added, units: number of new images, and of the new units that they make.
        changed, rebuilt: number of images whose annotation or file is another one, and of their units.
        gone: number of images that are not in the sources any more, and were there when it was made.
        examples: keys of some images, by "added", "changed" and "gone".
    """

    added: int = 0
    units: int = 0
    changed: int = 0
    rebuilt: int = 0
    gone: int = 0
    examples: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.gone)

    def __str__(self) -> str:
        parts = []
        if self.added:
            what = f"{_count(self.added, 'image')} {_be(self.added)} new{self._some('added')}"
            parts.append(f"{what}: {_count(self.units, 'unit')} {_be(self.units)} added")
        if self.changed:
            what = f"{_count(self.changed, 'image')} changed in the source{self._some('changed')}"
            parts.append(f"{what}: {_count(self.rebuilt, 'unit')} {_be(self.rebuilt)} built again")
        if self.gone:
            what = f"{_count(self.gone, 'image')} {_be(self.gone)} gone from the source{self._some('gone')}"
            stay = "stays" if self.gone == 1 else "stay"
            parts.append(f"{what} and {stay} in the corpus")
        return "; ".join(parts)

    def _some(self, what: str) -> str:
        found, number = self.examples.get(what, []), getattr(self, what)
        return f" ({', '.join(found)}{', ...' if number > len(found) else ''})" if found else ""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s'[: number != 1]}"


def _be(number: int) -> str:
    return "is" if number == 1 else "are"


class Grown(NamedTuple):
    """What becomes of a work list.

    Attributes:
        steps: of the list from now on; none if it never grew.
        growth: what is different in the sources.
        written: its table.
    """

    steps: list[Step]
    growth: Growth
    written: work_list_table.Written


def grow(old: WorkList, fresh: Path, places: dict[str, str], path: Path) -> Grown:
    """Write the table of a work list with what its sources have today.

    Args:
        old: the list as it lies in the corpus.
        fresh: a table of today's images, with the keys that images of the old list had.
        places: annotation files, tars and folders of today's sources.
        path: of the table to write.

    Raises:
        IntegrityError: a table is damaged.
    """
    merged = _Merged(old, fresh, places)
    units = NOW.after(merged.units(), lambda unit: unit[0].key)
    written = work_list_table.write_units(units, old.subset, old.images_per_shard, path, old.credits)
    return Grown(merged.steps(), merged.growth(), written)


class _Merged:
    """The units of a grown work list, and what was found on the way."""

    def __init__(self, old: WorkList, fresh: Path, places: dict[str, str]):
        self._old = old
        self._before = UnitReader(old.table_path)
        self._fresh = UnitReader(fresh)
        self._places = [place.rstrip("/") for place in places]
        self._today = {key: at for at, key in enumerate(self._fresh.keys())}
        self._digest = hashlib.sha256(f"{old.digest}\n".encode())
        self._found: dict[str, list[str]] = {"added": [], "changed": [], "gone": []}
        self._numbers = dict.fromkeys(self._found, 0)
        self._changed_units: list[int] = []
        self._num_new_units = 0

    def units(self) -> Iterator[list[CatalogEntry]]:
        known: set[str] = set()
        for index in range(self._old.num_units):
            unit = self._before.read(index)
            known.update(entry.key for entry in unit)
            yield self._updated(index, unit)
        new = (self._entry(at) for key, at in self._today.items() if key not in known)
        units = iter(lambda: list(islice(new, self._old.images_per_shard)), [])
        for number, unit in enumerate(units):
            for entry in unit:
                self._note("added", entry.key)
            self._cover(self._old.num_units + number, unit)
            self._num_new_units += 1
            yield unit

    def _updated(self, index: int, unit: list[CatalogEntry]) -> list[CatalogEntry]:
        """A unit of the old list with what is known of its images today."""
        updated, is_changed = [], False
        for before in unit:
            at = self._today.get(before.key)
            if before.drop is not None and before.drop.reason is Reason.REMOVED:
                updated.append(before)
            elif at is None:
                self._note("gone", before.key)
                updated.append(_gone(before))
            else:
                now = _with_known_photo(self._entry(at), before, self._places)
                if now.annotation is None and before.annotation is not None:  # its label map may come back
                    self._note("gone", before.key)
                    now = before
                elif is_other(before, now):
                    self._note("changed", before.key)
                    is_changed = True
                updated.append(now)
        if is_changed:
            self._changed_units.append(index)
            self._cover(index, updated)
        return updated

    def _entry(self, at: int) -> CatalogEntry:
        index, place = divmod(at, self._old.images_per_shard)
        return self._fresh.read(index)[place]

    def _note(self, what: str, key: str) -> None:
        self._numbers[what] += 1
        if len(self._found[what]) < EXAMPLES:
            self._found[what].append(key)

    def _cover(self, index: int, unit: list[CatalogEntry]) -> None:
        cover(self._digest, index, unit)

    def steps(self) -> list[Step]:
        steps, numbers = first_steps(self._old), self._numbers
        if not (numbers["added"] or numbers["changed"]):
            return self._old.steps
        units, images = steps[-1].units + self._num_new_units, steps[-1].images + numbers["added"]
        return [*steps, Step(self._digest.hexdigest(), units, images, self._changed_units)]

    def growth(self) -> Growth:
        return Growth(
            added=self._numbers["added"],
            units=self._num_new_units,
            changed=self._numbers["changed"],
            rebuilt=len(self._changed_units),
            gone=self._numbers["gone"],
            examples=self._found,
        )


def plan_without(work_list: WorkList, index: int, plan: str) -> str:
    """The `plan` of a unit when the images that were removed have left it.

    That of the newest step, unless the unit also waits for an image that has changed.

    Args:
        work_list: in which the images are removed.
        index: of the unit.
        plan: that it has now.
    """
    first, steps = 0, list[Step]()
    for step in first_steps(work_list):
        if first <= index < step.units or index in step.changed:
            steps.append(step)
        first = step.units
    digests = [step.digest for step in steps]
    later = steps[digests.index(plan) + 1 :] if plan in digests else []
    return digests[-1] if later and all(step.removes for step in later) else plan


def cover(digest: Any, index: int, unit: list[CatalogEntry]) -> None:
    """Make a unit part of the digest of a step."""
    digest.update(f"{index}\n".encode())
    for entry in unit:
        digest.update(work_list_table.content_of(entry))


def is_other(before: CatalogEntry, now: CatalogEntry) -> bool:
    """Whether an image is not what was planned: by its lists, or by the length of a tar's member."""
    if work_list_table.content_of(before) != work_list_table.content_of(now):
        return True
    lengths = [each.photo and each.photo.length for each in (before, now)]
    return None not in lengths and lengths[0] != lengths[1]


def _gone(before: CatalogEntry) -> CatalogEntry:
    """An image that its source does not list now; a verdict that it has stays."""
    if before.drop is not None and before.drop.reason not in ERRORS:
        return before
    return msgspec.structs.replace(before, drop=GONE)


def _with_known_photo(entry: CatalogEntry, before: CatalogEntry | None, places: list[str]) -> CatalogEntry:
    """The entry, where a photo that the list on disk has in one of today's folders stays where it was.

    That it is not listed now may mean that its folder is away. Who reads the photo finds out, and a unit of
    which too many are missing is held back. A plan without it would commit the unit as if it had never been.
    """
    is_missing = entry.drop is not None and entry.drop.reason is Reason.PHOTO_MISSING
    photo = before.photo if is_missing and before is not None and before.drop is None else None
    if photo is not None and photo.length is None and entry.annotation is not None:
        if any(photo.url.startswith(f"{place}/") for place in places):
            return msgspec.structs.replace(entry, photo=photo, drop=None)
    return entry


def with_known_photos(
    entries: Iterator[CatalogEntry], old: WorkList, places: dict[str, str]
) -> Iterator[CatalogEntry]:
    """The entries of a listing, each next to the one at its place in the list on disk; see above."""
    reader, folders = UnitReader(old.table_path), [place.rstrip("/") for place in places]
    known: Iterator[CatalogEntry | None] = chain(
        chain.from_iterable(map(reader.read, range(old.num_units))), iter(lambda: None, 0)
    )
    for entry, before in zip(entries, known, strict=False):
        yield _with_known_photo(entry, before if before and before.key == entry.key else None, folders)


# What is refused.


def refuse_other_roles(old: WorkList, sources: list[dict[str, Any]], summary: str) -> None:
    """Refuse the same places in other roles or in another order than those that units were committed of.

    Places that are new, or are gone, are no reason: photos are found later or elsewhere, and a corpus grows.

    Args:
        old: the work list; units of it are committed.
        sources: of the subset, as they are configured now.
        summary: where the list lies, for the message.

    Raises:
        IntegrityError: they are; shows both.
    """
    for number, before in enumerate(old.sources):
        after = sources[number] if number < len(sources) else None
        if after is not None and _is_of(before, after):
            continue
        is_another = after is not None and after["source"] != before["source"]
        if is_another or any(_is_of(before, each) for each in sources):
            raise IntegrityError(
                f"{summary}: source {number + 1} of {old.subset} is another one than when units were "
                "committed; list new sources after the old ones, and keep the places of the old ones"
            )
    roles = [option_texts(each) for each in (old.sources, sources[: len(old.sources)])]
    common = {place for _, place in roles[0]} & {place for _, place in roles[1]}
    was, now = ([each for each in found if each[1] in common] for found in roles)
    if was != now:
        changed = [
            f"{option} was {', '.join(before)}, is {', '.join(after)}"
            for option in sorted({name for name, _ in was + now})
            if (before := _of_role(was, option)) != (after := _of_role(now, option))
        ]
        raise IntegrityError(
            f"{summary}: the committed units were read with other settings: "
            f"{'; '.join(changed)}; change this back, or use a new `out`"
        )


def _of_role(found: list[tuple[str, str]], option: str) -> list[str]:
    return [value for name, value in found if name == option] or ["none of these"]


def _is_of(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether a configured source is an earlier one: of its kind, with one of its places."""
    places = [
        {text for name, text in option_texts([each]) if _is_place(each["source"], name)}
        for each in (before, after)
    ]
    return before["source"] == after["source"] and not places[0].isdisjoint(places[1])


def moved_sources(old: WorkList, sources: list[dict[str, Any]]) -> list[int]:
    """The numbers, from 1, of the sources that lie in other places than all those they were planned with."""
    pairs = zip(old.sources, sources, strict=False)
    return [number for number, pair in enumerate(pairs, 1) if not _is_of(*pair)]


def _is_place(kind: str, name: str) -> bool:
    options = find_options(kind)
    return name in options.model_fields and is_location(options, name)


def refuse_other_options(old: WorkList, sources: list[dict[str, Any]], growth: Growth, summary: str) -> None:
    """Refuse images that have changed because an option of their source has, not their files.

    Raises:
        IntegrityError: they have; names the option.
    """
    if not growth.changed:
        return
    pairs = list(zip(old.sources, sources, strict=False))
    if moved := moved_sources(old, sources):
        raise IntegrityError(
            f"{summary}: {_count(growth.changed, 'image')} of {old.subset} would become other ones, because "
            f"source {moved[0]} has none of the places that they were planned with; add the new source after "
            "the old one (if it is the old one in another place, build before anything else in it changes), "
            "or use a new `out`"
        )
    other = [
        f"{name} was {before.get(name)}, is {after.get(name)}"
        for before, after in pairs
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name) and _decides(before["source"], name, before.get(name))
    ]
    if other:
        raise IntegrityError(
            f"{summary}: {_count(growth.changed, 'image')} of {old.subset} would become other ones, because "
            f"an option of their source has changed: {'; '.join(other)}; change it back, or use a new `out`"
        )


def _decides(kind: str, name: str, value: Any) -> bool:
    """Whether an option is neither a place nor a list, to which something may be added."""
    return not isinstance(value, list) and not _is_place(kind, name)


def difference(old: WorkList, new: WorkList, table: str, damage: str | None) -> str:
    """The message that refuses a resume for which a corpus cannot grow; "" if it can."""
    head = f"{table}: the sources or the configuration have changed since this work list was made: "
    fix = "; change them back, or use a new `out`"
    if old.images_per_shard != new.images_per_shard:
        return f"{head}images_per_shard was {old.images_per_shard}, is now {new.images_per_shard}{fix}"
    limits = [each.fingerprint.get("limit", "none") for each in (old, new)]
    if limits[0] != limits[1]:
        return f"{head}the limit of images was {limits[0]}, is now {limits[1]}{fix}"
    if damage is not None:
        return f"{head}the images that differ cannot be named, because the old work list is {damage}{fix}"
    return ""
