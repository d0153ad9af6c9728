"""Questions about whole scenes of the toy world, with their answers: what a tiny Base learns, and is asked.

Every answer follows from what was drawn. A question names a thing only by what no other thing of the scene
shares, and gives a choice only where one answer is right. All answers that are scored are short: a word, or
four for the question what a thing is. All answers to a question have the same number of tokens, because this
training shows a model how long an answer is going to be: by the number of its masked tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from paracaption.model_training.toy import world as toy
from paracaption.model_training.toy.scenes import PLACES, Scene, place_of
from paracaption.model_training.toy.shapes import COLORS, Kind

WORLD = replace(toy.EASY, regions=(2, 3), photo_format="png")
"""The things look like those that the sample model was trained on."""

NUMBERS = ("no", "one", "two", "three")
_PLACES = [place for row in PLACES for place in row]
_COLUMNS, _ROWS = ("left", "middle", "right"), ("top", "middle", "bottom")


class Asked(NamedTuple):
    """A question about a scene.

    Attributes:
        kind: the type of the question, one of `KINDS`.
        question: the text.
        answer: the right answer, word by word.
    """

    kind: str
    question: str
    answer: str


class Seen(NamedTuple):
    """A thing as questions name it: what it looks like, and the number of its ninth of the image."""

    kind: Kind
    place: int

    @property
    def name(self) -> str:
        """Its color and shape, such as "red circle"."""
        return f"{self.kind.colour} {self.kind.shape}"


def things_of(scene: Scene) -> list[Seen]:
    """The things of a scene as they are read: from the top left to the bottom right."""
    seen = [
        Seen(thing.kind, _PLACES.index(place_of(scene, number))) for number, thing in enumerate(scene.things)
    ]
    return sorted(seen, key=lambda each: (each.place, each.kind))


def _only(things: list[Seen], value: Callable[[Seen], Any]) -> list[Seen]:
    """The things that share a value with no other."""
    values = [value(each) for each in things]
    return [each for each in things if values.count(value(each)) == 1]


def _pick(rng: np.random.Generator, some: list[Any]) -> Any:
    return some[rng.integers(len(some))]


def _named(things: list[Seen], rng: np.random.Generator) -> Seen | None:
    """A thing whose color and shape no other thing shares; None if there is none."""
    named = _only(things, lambda each: each.name)
    return _pick(rng, named) if named else None


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _color(things: list[Seen], rng: np.random.Generator) -> Asked | None:
    ways = [(f"the {each.kind.shape}", each) for each in _only(things, lambda each: each.kind.shape)]
    ways += [(f"the thing {_PLACES[each.place]}", each) for each in _only(things, lambda each: each.place)]
    if not ways:
        return None
    name, thing = _pick(rng, ways)
    return Asked("color", f"What color is {name}?", thing.kind.colour)


def _shape(things: list[Seen], rng: np.random.Generator) -> Asked | None:
    ways = [(f"the {each.kind.colour} thing", each) for each in _only(things, lambda each: each.kind.colour)]
    ways += [(f"the thing {_PLACES[each.place]}", each) for each in _only(things, lambda each: each.place)]
    if not ways:
        return None
    name, thing = _pick(rng, ways)
    return Asked("shape", f"What shape is {name}?", thing.kind.shape)


def _size(things: list[Seen], rng: np.random.Generator) -> Asked | None:
    thing = _named(things, rng)
    if thing is None:
        return None
    return Asked("size", f"Is the {thing.name} small or large?", thing.kind.size)


def _texture(things: list[Seen], rng: np.random.Generator) -> Asked | None:
    thing = _named(things, rng)
    if thing is None:
        return None
    return Asked("texture", f"Is the {thing.name} plain, striped or dotted?", thing.kind.texture)


def _column(things: list[Seen], rng: np.random.Generator) -> Asked | None:
    thing = _named(things, rng)
    if thing is None:
        return None
    question = f"Is the {thing.name} on the left, in the middle or on the right?"
    return Asked("column", question, _COLUMNS[thing.place % 3])


def _row(things: list[Seen], rng: np.random.Generator) -> Asked | None:
    thing = _named(things, rng)
    if thing is None:
        return None
    question = f"Is the {thing.name} at the top, in the middle or at the bottom?"
    return Asked("row", question, _ROWS[thing.place // 3])


def _count(things: list[Seen], rng: np.random.Generator) -> Asked | None:
    if rng.random() < 0.5:
        return Asked("count", "How many things are there?", NUMBERS[len(things)])
    shape = _pick(rng, list(WORLD.shapes))
    number = sum(each.kind.shape == shape for each in things)
    return Asked("count", f"How many {shape}s are there?", NUMBERS[number])


def _exists(things: list[Seen], rng: np.random.Generator) -> Asked | None:
    """Half of the answers are yes. Half of the others name a color and a shape that are there, but apart."""
    names = {each.name for each in things}
    if rng.random() < 0.5:
        return Asked("yes or no", f"Is there {_article(_pick(rng, sorted(names)))}?", "yes")
    colors = sorted({each.kind.colour for each in things})
    shapes = sorted({each.kind.shape for each in things})
    apart = [f"{color} {shape}" for color in colors for shape in shapes if f"{color} {shape}" not in names]
    if not apart or rng.random() < 0.5:
        apart = [f"{color} {shape}" for color in COLORS for shape in WORLD.shapes]
        apart = [name for name in apart if name not in names]
    return Asked("yes or no", f"Is there {_article(_pick(rng, apart))}?", "no")


def _thing(things: list[Seen], rng: np.random.Generator) -> Asked | None:
    placed = _only(things, lambda each: each.place)
    if not placed:
        return None
    thing = _pick(rng, placed)
    answer = _article(f"{thing.kind.size} {thing.name}")
    return Asked("thing", f"What is {_PLACES[thing.place]}?", answer)


def _caption(thing: Seen) -> str:
    return f"a {' '.join(thing.kind)} {_PLACES[thing.place]}"


def _describe(things: list[Seen], rng: np.random.Generator) -> Asked | None:
    question = _pick(rng, ["Describe the image.", "What is in the image?"])
    return Asked("describe", question, ", ".join(map(_caption, things)))


def _tell(things: list[Seen], rng: np.random.Generator) -> Asked | None:
    """All about a thing that is named by its color, its shape, both, or its place."""
    names: list[tuple[Callable[[Seen], Any], Callable[[Seen], str]]] = [
        (lambda each: each.name, lambda each: each.name),
        (lambda each: each.kind.shape, lambda each: each.kind.shape),
        (lambda each: each.kind.colour, lambda each: f"{each.kind.colour} thing"),
        (lambda each: each.place, lambda each: f"thing {_PLACES[each.place]}"),
    ]
    ways = [(text(each), each) for value, text in names for each in _only(things, value)]
    if not ways:
        return None
    name, thing = _pick(rng, ways)
    return Asked("tell", f"Describe the {name}.", _caption(thing))


KINDS: dict[str, Callable[[list[Seen], np.random.Generator], Asked | None]] = {
    "color": _color,
    "shape": _shape,
    "size": _size,
    "texture": _texture,
    "column": _column,
    "row": _row,
    "count": _count,
    "yes or no": _exists,
    "thing": _thing,
}
"""The types of questions that are scored, each with what asks one about a scene; None if it has none."""

_LONG = {"describe": _describe, "tell": _tell}
"""Types that are trained on alone."""

STAGES: dict[int, tuple[tuple[str, ...], int]] = {
    1: (("describe",), 1),
    2: (("describe", *["tell"] * 3), 3),
    3: ((*KINDS, "count", "yes or no", "describe", *["tell"] * 4), 4),
    4: ((*KINDS, "count", "yes or no", *["tell"] * 3, *["describe"] * 6), 1),
    5: ((*KINDS, *["column", "row"] * 3, *["count", "yes or no"] * 2, "shape", "size", "thing", "tell"), 1),
}
"""Of each stage, what its conversations are about, the more often the likelier, and their most turns.

Captions align the projector. Then all is told about each thing, whatever names it; then all that is scored is
asked, too; then one question or description alone. The last stage has no descriptions of images: of the words
that the model learned from before, 73% were theirs, and 13% those of answers. What was answered worst is
asked most often."""


def ask_about(scene: Scene, kind: str, rng: np.random.Generator) -> Asked | None:
    """A question of a type about a scene."""
    return (KINDS | _LONG)[kind](things_of(scene), rng)


def conversation(scene: Scene, stage: int, rng: np.random.Generator) -> list[Asked]:
    """The turns of a conversation about a scene; no question is asked twice."""
    kinds, wanted = STAGES[stage]
    turns: dict[str, Asked] = {}
    for _ in range(4 * wanted):
        asked = ask_about(scene, _pick(rng, list(kinds)), rng)
        if asked is not None and len(turns) < wanted:
            turns.setdefault(asked.question, asked)
    return list(turns.values())


def held_out(scenes: list[Scene], each: int, seed: int) -> Iterator[tuple[int, Asked]]:
    """Questions for a test, as many of each type, with the number of the scene each is about."""
    for kind in KINDS:
        rng = np.random.default_rng([seed, list(KINDS).index(kind)])
        found = 0
        for number in rng.permutation(len(scenes)).tolist():
            asked = ask_about(scenes[number], kind, rng)
            if asked is not None and found < each:
                found += 1
                yield number, asked
        if found < each:
            raise ValueError(f"{found} of {each} questions about {kind}; draw more scenes")


def words() -> list[str]:
    """The words of questions and answers that captions do not have, and those with which they begin."""
    text = (
        "What color is the thing shape Is small or large plain striped dotted on left in middle right at top "
        "bottom How many things are there Which Describe image yes no one two three four a an"
    )
    return [*text.split(), *COLORS, *WORLD.shapes, *(f"{shape}s" for shape in WORLD.shapes)]
