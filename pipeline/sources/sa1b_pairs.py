"""Which JSON of SA-1B a photo has: by their names and folders, where these leave no doubt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Generic, NamedTuple, Protocol, TypeVar

from . import file_names


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Member = TypeVar("Member", bound=_Named)


class Group(Generic[Member]):
    """The photos and the JSONs of one base name."""

    def __init__(self) -> None:
        self.pictures: list[Member] = []
        self.texts: list[Member] = []


class Pair(NamedTuple, Generic[Member]):
    """A photo with its JSON, or one of them alone; `doubt` says why neither of several was taken."""

    picture: Member | None
    text: Member | None
    doubt: str = ""


class Groups(Generic[Member]):
    """The members of a tar or of folders by base name; which of their folders hold photos and which JSONs.

    Attributes:
        others: names of what is neither.
    """

    def __init__(self, members: Iterable[Member] = ()) -> None:
        self.others: list[str] = []
        self._groups: dict[str, Group[Member]] = {}
        self._with_pictures: set[str] = set()
        self._with_texts: set[str] = set()
        for member in members:
            self.add(member)

    def add(self, member: Member) -> None:
        """Sort a member in by the ending of its name."""
        ending, folder = file_names.ending(member.name), file_names.folder(member.name)
        group = self._groups.setdefault(file_names.stem(member.name), Group())
        if ending == ".json":
            group.texts.append(member)
            self._with_texts.add(folder)
        elif ending in file_names.PHOTO_ENDINGS:
            group.pictures.append(member)
            self._with_pictures.add(folder)
        else:
            self.others.append(member.name)

    def pairs(self) -> Iterator[Pair[Member]]:
        """Each photo and each JSON once.

        A photo's JSON lies in its folder; a .jpg goes before photos of other endings, as published. Else the
        photo is of a folder without any JSON, the JSON of one without any photo, and they are the only ones
        of their name, or those whose folders are most alike (`a/images` and `a/annotations`).
        """
        for group in self._groups.values():
            yield from self._match(group)

    def _match(self, group: Group[Member]) -> Iterator[Pair[Member]]:
        pictures, texts = list(group.pictures), list(group.texts)
        while beside := _in_one_folder(pictures, texts):
            pictures.remove(beside[0])
            texts.remove(beside[1])
            yield Pair(*beside)
        photos = [each for each in pictures if file_names.folder(each.name) not in self._with_texts]
        records = [each for each in texts if file_names.folder(each.name) not in self._with_pictures]
        is_only = len(group.pictures) == len(group.texts) == 1
        while chosen := _most_alike(photos, records, is_only):
            for left in (photos, pictures):
                left.remove(chosen[0])
            for left in (records, texts):
                left.remove(chosen[1])
            yield Pair(*chosen)
        doubt = ""
        if (photos and records) or _share_a_folder(pictures, texts):
            doubt = (
                f"which of the photos ({_listed(pictures)}) belongs to which JSON ({_listed(texts)}) is not "
                "clear; put each photo and its JSON into one folder"
            )
        yield from (Pair(picture, None, doubt) for picture in pictures)
        yield from (Pair(None, text, doubt) for text in texts)


def _in_one_folder(pictures: list[Member], texts: list[Member]) -> tuple[Member, Member] | None:
    for text in texts:
        folder = file_names.folder(text.name)
        beside = [each for each in pictures if file_names.folder(each.name) == folder]
        published = [each for each in beside if file_names.ending(each.name) == ".jpg"]
        if len(choices := published or beside) == 1:
            return choices[0], text
    return None


def _share_a_folder(pictures: list[Member], texts: list[Member]) -> bool:
    folders = {file_names.folder(each.name) for each in pictures}
    return any(file_names.folder(each.name) in folders for each in texts)


def _most_alike(pictures: list[Member], texts: list[Member], is_only: bool) -> tuple[Member, Member] | None:
    """A photo and a JSON of different folders that mean only each other."""
    if is_only and len(pictures) == len(texts) == 1:
        return pictures[0], texts[0]
    for picture in pictures:
        text = _only_best(picture, texts)
        if text is not None and _only_best(text, pictures) is picture:
            return picture, text
    return None


def _only_best(member: Member, others: Sequence[Member]) -> Member | None:
    scores = [_likeness(file_names.folder(member.name), file_names.folder(other.name)) for other in others]
    best = max(scores, default=0)
    return others[scores.index(best)] if best and scores.count(best) == 1 else None


def _likeness(first: str, second: str) -> int:
    """How many folders two paths have in common at their ends, both ends counted."""
    parts = first.split("/"), second.split("/")
    return sum(
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*sides, strict=False)))
        for sides in (parts, (parts[0][::-1], parts[1][::-1]))
    )


def _listed(members: Sequence[_Named]) -> str:
    names = [member.name for member in members[:3]]
    return " and ".join(names) + (" and more" if len(members) > 3 else "")
