"""Keys in a subset that grows: an image keeps the key that it was given first, and no new image takes it.

`Catalog.claim_key` gives keys in the order in which the sources list their images, so an image that is
listed before the old ones could take the key of one of them. Where the sources of a planned subset have
changed, they are therefore listed twice: first as always, then with the keys that `settle` has made of all
claims, as if every image that was planned before had been listed first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from . import file_names

Claims = Mapping[str, list[tuple[str, str]]]
"""Key of the base name -> (folders, list that names it) of each image that claimed it, in order."""

IsSame = Callable[[str, str, str, str], bool]
"""Whether (folders, list) and (folders, list) of one base name mean the same image."""

_DUPLICATE = re.compile(r"-dup\d+$")


class Settled(NamedTuple):
    """The key of a claim, "" for the one that its folders make; and whether its image was claimed before."""

    key: str
    again: bool


class EarlierKeys:
    """The keys that a work list has given out.

    A key that does not come from its image's file name, as some sources of the user's own make them, is left
    to its source.

    Args:
        places: the annotation files, tars and folders that the work list was made of.
    """

    def __init__(self, places: Iterable[str]):
        self._places = {place.rstrip("/") for place in places}
        self._keys: dict[str, dict[str, list[str]]] = {}
        self._taken: set[str] = set()

    def add(self, key: str, file_name: str) -> None:
        """Add an image of the work list, in its order."""
        name = file_names.path_stem(file_name)
        folder, base = file_names.folder(name), file_names.base_name(name)
        made = {
            file_names.key_of(each, early) for each in (base, f"{folder}/{base}") for early in (False, True)
        }
        if key in made or _DUPLICATE.sub("", key) in made:
            own = file_names.key_of(base)
            self._keys.setdefault(own, {}).setdefault(folder, []).append(key)
            self._taken.add(key)

    def settle(self, claims: Claims, is_same: IsSame) -> dict[str, list[Settled]]:
        """What becomes of each claim of a listing.

        Args:
            claims: of the whole listing.
            is_same: whether two claims of one base name mean the same image.

        Returns:
            By the key of the base name, for each of its claims in order.
        """
        return {key: self._settle(key, each, is_same) for key, each in claims.items()}

    def _settle(self, key: str, claims: list[tuple[str, str]], is_same: IsSame) -> list[Settled]:
        order = sorted(range(len(claims)), key=lambda at: not self._is_earlier(claims[at][1]))
        known = self._find_known(key, [(at, claims[at][0]) for at in order])
        found: dict[int, Settled] = {}
        seen: list[tuple[str, str]] = []
        for at in order:
            folder, home = claims[at]
            again = any(is_same(folder, home, *claim) for claim in seen)
            seen.append((folder, home))
            if at in known:
                found[at] = Settled(known[at], _DUPLICATE.search(known[at]) is not None)
            elif again:
                found[at] = Settled(self._duplicate(key, len(seen)), True)
            elif len(seen) == 1 and key not in self._taken:
                found[at] = Settled(key, False)
            else:
                found[at] = Settled("", False)
        return [found[at] for at in range(len(claims))]

    def _find_known(self, key: str, claims: list[tuple[int, str]]) -> dict[int, str]:
        """The keys of the claims that are of earlier images: of the same folders, else of none."""
        keys = {folder: list(each) for folder, each in self._keys.get(key, {}).items()}
        found = {at: keys[folder].pop(0) for at, folder in claims if keys.get(folder)}
        left = [each for folder in keys for each in keys[folder]]
        bare = [at for at, folder in claims if at not in found and not folder]
        return found | dict(zip(bare, left, strict=False))

    def _duplicate(self, key: str, number: int) -> str:
        while (found := f"{key}-dup{number}") in self._taken:
            number += 1
        self._taken.add(found)
        return found

    def _is_earlier(self, home: str) -> bool:
        """Whether a list that names images is one of the places, or lies in one."""
        place = home.rstrip("/")
        while place and place not in self._places:
            place = place.rpartition("/")[0]
        return bool(place) or not home
