"""Category lists, and the plain words that their names become in a prompt."""

from __future__ import annotations

import functools
import json
import re
from importlib import resources
from typing import Any

import msgspec

from ...schemas.errors import ConfigError
from ...schemas.records import Blob
from ..io import failures, files
from ..io.file_kinds import what_is
from .coco_json import parse_json, problem_of

_PLAIN = {
    "floor-wood": "wooden floor",
    "wall-brick": "brick wall",
    "wall-stone": "stone wall",
    "wall-tile": "tiled wall",
    "wall-wood": "wooden wall",
    "window-blind": "window blind",
    "playingfield": "playing field",
    "moniter/tv": "monitor or tv",
    "bakset": "basket",
    "ballon": "balloon",
    "hotair ballon": "hot air balloon",
    "dinning table": "dining table",
    "billards": "billiards",
    "extention cord": "extension cord",
    "mushroon": "mushroom",
    "campel": "camel",
    "buttefly": "butterfly",
    "noddles": "noodles",
    "tape measur/ ruler": "tape measure or ruler",
    "table teniis paddle": "table tennis paddle",
    "trash bin can": "trash can",
    "hair drier": "hair dryer",
}
"""Names whose plain form no rule finds: COCO's materials, and Objects365's misspellings."""

_IS_THING = {1: True, 0: False, "1": True, "0": False}
"""What `isthing` may be; true and false equal 1 and 0."""

_SUFFIX = re.compile(r"(-other)?(-merged)$|-(other|stuff)$")


class Category(msgspec.Struct, frozen=True, array_like=True):
    """A category: the publisher's id, the plain name, thing (countable) or stuff."""

    id: int
    name: str
    is_thing: bool


def plain_name(name: str) -> str:
    """The name as a person would say it: "tree-merged" is a tree, "wall-brick" a brick wall.

    Lower case; suffixes of merged classes gone; `/` is "or"; hyphens and underscores are spaces.
    """
    low = " ".join(name.lower().split())
    if low in _PLAIN:
        return _PLAIN[low]
    low = _SUFFIX.sub("", low)
    low = re.sub(r"\s*\([^)]*\)", "", low) or low
    low = re.sub(r"\s*/\s*", " or ", low)
    return " ".join(re.sub(r"[-_]+", " ", low).split())


class CategoryTable:
    """A category list, by id and by name."""

    def __init__(self, categories: list[Category]):
        self.by_id = {category.id: category for category in categories}
        self._by_name = {category.name: category for category in reversed(categories)}

    def find(self, number: int | None, name: str | None) -> Category | None:
        """The category of an id; without one, of a name in any spelling that becomes the same plain one."""
        if number is not None:
            return self.by_id.get(number)
        return None if name is None else self._by_name.get(plain_name(name))


def make_table(raw: Any, where: str) -> CategoryTable:
    """A table from a list of {id, name, isthing}; `isthing` is taken as true where it is not given.

    A name that is not UTF-8 is left out: its segments are then of an unknown category. A category may be
    repeated as it is.

    Raises:
        ConfigError: not such a list, an empty name, or an id of several categories; `where` names it.
    """
    categories: dict[int, Category] = {}
    rows = raw if isinstance(raw, list) else []
    for place, row in enumerate(rows):
        category = _category(row, f"{where}: category {place}")
        if category is None:
            continue
        before = categories.setdefault(category.id, category)
        if before != category:
            names = f"{before.name!r} and {category.name!r}"
            if before.name == category.name:
                names = f"{before.name!r} with isthing {before.is_thing:d} and {category.is_thing:d}"
            raise ConfigError(
                f"{where}: category {place}: id {category.id} is used for {names}; give each its own id"
            )
    if not categories:
        raise ConfigError(f"{where}: no categories; give a list of id, name and isthing")
    return CategoryTable(list(categories.values()))


def choose_table(own: bytes, url: str, given: str | None) -> CategoryTable:
    """The category list of a document: the one that the configuration names, its own, or COCO's.

    Args:
        own: the document's `categories`, as JSON.
        url: of the document.
        given: URL of the configured list; None if there is none.

    Raises:
        ConfigError: it is no category list.
    """
    if given is not None or own.strip() in (b"", b"[]", b"null"):
        return load_categories(given)
    try:
        return make_table(parse_json(own), url)
    except ValueError as error:
        raise ConfigError(f"{url}: categories: {error}") from error


def _category(row: Any, where: str) -> Category | None:
    """The category of a row; None if its name is not UTF-8."""
    number = row.get("id") if isinstance(row, dict) else None
    name = row.get("name") if isinstance(row, dict) else None
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if type(number) is not int or not isinstance(name, str) or not -(1 << 63) <= number < 1 << 63:
        raise ConfigError(f'{where} is not {{"id", "name", "isthing"}}: {json.dumps(row)[:80]}')
    if problem_of(name):
        return None
    if not plain_name(name):
        raise ConfigError(f"{where}: id {number} has the name {name!r}; give it one that says what it is")
    is_thing = row.get("isthing", 1)
    if not isinstance(is_thing, str | int | float) or is_thing not in _IS_THING:
        detail = f"isthing is {json.dumps(is_thing)[:80]}"
        raise ConfigError(f"{where}: id {number}: {detail}; give 1 for things, 0 for stuff")
    return Category(number, plain_name(name), _IS_THING[is_thing])


@functools.lru_cache(maxsize=16)
def load_categories(url: str | None) -> CategoryTable:
    """The category list of a JSON file: a list, or an object with `categories`. Without one, COCO's 133.

    Raises:
        ConfigError: missing or no such list.
        OSError: it cannot be read now.
    """
    if url is None:
        text = (
            resources.files("paracaption.pipeline.sources")
            .joinpath("coco_panoptic_133.json")
            .read_text("utf-8")
        )
        return make_table(json.loads(text), "coco_panoptic_133.json")
    try:
        raw = _read_json(url)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and failures.classify(error) is failures.Kind.TRANSIENT:
            raise
        raise ConfigError(f"{url}: not a category list ({error}); give a JSON list of categories") from error
    return make_table(raw.get("categories") if isinstance(raw, dict) else raw, url)


def _read_json(url: str) -> Any:
    data = files.fetch(Blob(url))
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        again = files.fetch(Blob(url))
        if again == data:
            if words := what_is(data):
                raise ValueError(words) from None
            raise
        return json.loads(again)
