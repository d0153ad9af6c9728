"""Damages of JSON that stays JSON: fields of odd type, records that are missing, doubled or mixed up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from tests.cases.layouts import Made
from tests.cases.parts import TEXT, Parts, kind_of

_ODD: tuple[Any, ...] = (
    None, True, False, "", "abc", "5", 5.0, 1.5, 0, -1, 1e300, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400,
    float("nan"), float("inf"), [], {}, [1], {"a": 1}, "\ud800", "../x", "/etc/passwd", "a\\b.jpg", "x" * 300,
)  # fmt: skip
_MASKS = ("segmentation", "counts", "size")
"""Where the mask itself is written: another one that is valid there is another mask, and nothing can tell."""

_NUMBERS = ("id", "image_id", "category_id", "area", "iscrowd", "width", "height", "isthing")

Place = tuple[Any, Any]


def places(value: Any) -> Iterator[Place]:
    """Every (container, key) of a document, but those inside a mask."""
    for key, child in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(child, dict | list) and key not in _MASKS:
            yield from places(child)


def of_json(change: Callable[[Random, Any], str | None]) -> Callable[[Random, Made, Parts], str | None]:
    """A damage of the parsed value of one JSON."""

    def damage(random: Random, _made: Made, parts: Parts) -> str | None:
        names = [name for name in parts if kind_of(name) == TEXT and not name.startswith("categories")]
        if not names:
            return None
        name = random.choice(names)
        try:
            value = json.loads(parts[name])
        except (ValueError, UnicodeDecodeError):
            return None
        said = change(random, value) if isinstance(value, dict | list) else None
        if said is None:
            return None
        parts[name] = json.dumps(value).encode("utf-8", "surrogatepass")
        return f"{name}: {said}"

    return damage


def _any(random: Random, value: Any, *keys: str) -> Place | None:
    found = [place for place in places(value) if not keys or place[1] in keys]
    return random.choice(found) if found else None


def odd_value(random: Random, value: Any) -> str | None:
    place = _any(random, value)
    if place is None:
        return None
    place[0][place[1]] = random.choice(_ODD)
    return f"{place[1]!r} = {str(place[0][place[1]])[:30]!r}"


def other_type(random: Random, value: Any) -> str | None:
    """Numbers as text or with a point, as spreadsheets and data frames write them; everywhere under a key."""
    place = _any(
        random, value, "id", "image_id", "category_id", "area", "iscrowd", "width", "height", "isthing"
    )
    if place is None:
        return None
    key, kind = place[1], random.choice((str, float, lambda number: number or None))
    for container, name in places(value):
        if name == key and isinstance(container[name], int):
            container[name] = kind(container[name])
    return f"{key!r} as {getattr(kind, '__name__', 'null')}"


def without(random: Random, value: Any) -> str | None:
    place = _any(random, value)
    if place is None:
        return None
    del place[0][place[1]]
    return f"without {place[1]!r}"


def doubled(random: Random, value: Any) -> str | None:
    lists = [child[key] for child, key in places(value) if isinstance(child[key], list) and child[key]]
    lists = [each for each in lists if isinstance(each[0], dict)]
    if not lists:
        return None
    chosen = random.choice(lists)
    chosen.insert(random.randrange(len(chosen) + 1), json.loads(json.dumps(random.choice(chosen))))
    return "a record twice"


def swapped(random: Random, value: Any) -> str | None:
    """The same field of two records, as of images, annotations or segments, mixed up."""
    lists = [child[key] for child, key in places(value) if isinstance(child[key], list)]
    lists = [each for each in lists if len(each) > 1 and all(isinstance(record, dict) for record in each)]
    if not lists:
        return None
    first, second = random.sample(random.choice(lists), 2)
    keys = sorted((first.keys() & second.keys()) - {"segmentation"})
    if not keys:
        return None
    key = random.choice(keys)
    first[key], second[key] = second[key], first[key]
    return f"{key!r} of two records swapped"


def same_ids(random: Random, value: Any) -> str | None:
    """Two images of one id, as merged releases have them."""
    images = value.get("images") if isinstance(value, dict) else None
    if not isinstance(images, list) or len(images) < 2 or not all(isinstance(each, dict) for each in images):
        return None
    for each in images:
        each["id"] = 1
    for each in value.get("annotations") or ():
        if isinstance(each, dict):
            each["image_id"] = 1
    if random.random() < 0.5:
        value["annotations"] = list(reversed(value.get("annotations") or []))
    return "all images have the id 1"


def reordered(random: Random, value: Any) -> str | None:
    lists = [child[key] for child, key in places(value) if isinstance(child[key], list)]
    if not lists:
        return None
    random.shuffle(random.choice(lists))
    return "a list in another order"


def other_name(random: Random, value: Any) -> str | None:
    place = _any(random, value, "file_name")
    if place is None or not isinstance(place[0][place[1]], str):
        return None
    name = place[0][place[1]]
    stem, _, ending = name.rpartition(".")
    place[0][place[1]] = random.choice(
        (
            stem,
            f"{stem}.{ending.upper()}",
            f"train/{name}",
            f"x\\{name}",
            f"{stem}.webp",
            f"other_{name}",
            f"./{name}",
        )
    )
    return f"{name!r} is called {place[0][place[1]]!r}"


FIELDS = {
    "field odd": of_json(odd_value),
    "field of another type": of_json(other_type),
    "field missing": of_json(without),
    "record doubled": of_json(doubled),
    "fields swapped": of_json(swapped),
    "image ids repeated": of_json(same_ids),
    "list reordered": of_json(reordered),
    "named otherwise": of_json(other_name),
}
