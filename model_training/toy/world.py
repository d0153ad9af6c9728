"""A small world with known truth, in which learning can be proved on a CPU.

`write_world` draws scenes and writes them as source data in COCONut's layout, with a `build.yaml` whose
captioner knows the truth. So the whole way runs: sources, filters, shards, trainer, decoder, benchmark.
What a model says is read by `parse` and judged by `score`, which tells an error from what is a neighbour's.

    write_world("toy/train", 4000, seed=0)
    write_world("toy/heldout", 200, seed=0, split="heldout")
    paracaption build toy/train/build.yaml

A caption is "a small striped red circle", with `places` "... at the top left", and with `relations` also
"..., right of an orange square": the nearest other thing. No two scenes of a world hold the same things, and
none of one split holds exactly the things that one of the other split does, whatever their seeds and options.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...schemas.errors import ConfigError
from ..model.layout import CORRECTED
from . import scenes as toy_scenes
from .scenes import COLOURS, PLACES, SHAPES, SIDES, SIZES, SPLITS, TEXTURES, Options, Scene

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ...schemas.records import ImageRecord

EASY = Options(
    canvas=((96, 96),),
    unit_px=16.0,
    shapes=("circle", "triangle", "bar"),
    textures=("plain", "striped", "dotted"),
    turn_deg=10.0,
    noise=3.0,
)
"""The world of configs/train/tiny.yaml: few kinds of things, on photos of few patches."""

CATEGORIES = [{"id": number, "name": shape, "isthing": 1} for number, shape in enumerate(SHAPES, 1)]


class Attributes(NamedTuple):
    """What a caption says; "" for what it does not say.

    Attributes:
        size, texture, colour, shape: of the thing.
        place: in which ninth of the image it is.
        side: on which side of the nearest other thing it is.
        near_colour, near_shape: of that other thing.
    """

    size: str
    texture: str
    colour: str
    shape: str
    place: str = ""
    side: str = ""
    near_colour: str = ""
    near_shape: str = ""


VALUES: dict[str, tuple[str, ...]] = {
    "size": SIZES,
    "texture": TEXTURES,
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "place": tuple(place for row in PLACES for place in row),
    "side": SIDES,
    "near_colour": tuple(COLOURS),
    "near_shape": SHAPES,
}
"""What each attribute can be."""


class Score(NamedTuple):
    """How a caption compares with the truth.

    Attributes:
        exact: it says all of the truth, and nothing else.
        wrong: attributes that it has wrong or does not say.
        leaked: those of them that are right for a neighbour.
        by_chance: how many would be, if what it says wrongly were drawn from all wrong values; leakage is
            what is above this.
    """

    exact: bool
    wrong: tuple[str, ...] = ()
    leaked: tuple[str, ...] = ()
    by_chance: float = 0.0


def truth(scene: Scene, options: Options) -> list[Attributes]:
    """What is true of each thing of a scene, as far as the options have it said."""
    found = []
    for number, thing in enumerate(scene.things):
        attributes = Attributes(*thing.kind)
        if options.places:
            attributes = attributes._replace(place=toy_scenes.place(scene, number))
        if options.relations:
            side, other = toy_scenes.nearest(scene, number)
            kind = scene.things[other].kind
            attributes = attributes._replace(side=side, near_colour=kind.colour, near_shape=kind.shape)
        found.append(attributes)
    return found


def say(attributes: Attributes) -> str:
    """The caption that says them; `parse` reads it."""
    said = f"a {' '.join(attributes[:4])}"
    if attributes.place:
        said += f" {attributes.place}"
    if attributes.side:
        article = "an" if attributes.near_colour[:1] in "aeiou" else "a"
        near = f"{attributes.side} {article} {attributes.near_colour} {attributes.near_shape}"
        said += f"{',' if attributes.place else ''} {near}"
    return said


def _any(name: str, group: str | None = None) -> str:
    return f"(?P<{group or name}>{'|'.join(VALUES[name])})"


_CAPTION = re.compile(
    rf"a {_any('size')} {_any('texture')} {_any('colour')} {_any('shape')}(?: {_any('place')})?"
    rf"(?:(?(place),) {_any('side')} an? {_any('near_colour')} {_any('near_shape')})?"
)
_SIDE = re.compile(rf"\b{_any('side')}\b")


def parse(caption: str) -> Attributes | None:
    """What a caption says; None if it is none that `say` could have said."""
    found = _CAPTION.fullmatch(caption.strip())
    if not found:
        return None
    attributes = Attributes(**found.groupdict(default=""))
    return attributes if say(attributes) == caption.strip() else None


def score(predicted: str, truth: str, neighbours: Iterable[str]) -> Score:
    """Compare a caption with the truth and with what is true of the other regions of its image.

    Args:
        predicted: any text. One that does not parse is never exact, and read as far as it goes.
        truth: the region's true caption.
        neighbours: the true captions of the image's other regions.

    Raises:
        ValueError: a true caption does not parse.
    """
    right, *others = (_parsed(caption) for caption in (truth, *neighbours))
    said = parse(predicted)
    if said == right:
        return Score(True)
    said = said or _read_loosely(predicted)
    wrong, leaked, by_chance = [], [], 0.0
    for name, each, correct in zip(Attributes._fields, said, right, strict=True):
        if each == correct:
            continue
        wrong.append(name)
        theirs = {getattr(other, name) for other in others} - {correct, ""}
        if each:
            by_chance += len(theirs) / (len(VALUES[name]) - bool(correct))
        if each in theirs:
            leaked.append(name)
    return Score(False, tuple(wrong), tuple(leaked), by_chance)


def _parsed(caption: str) -> Attributes:
    attributes = parse(caption)
    if attributes is None:
        raise ValueError(f"{caption!r} is no true caption of this world")
    return attributes


def _read_loosely(caption: str) -> Attributes:
    """The first word or phrase for each attribute; what follows the side is of the other thing."""
    spans = {
        place: found.span() for place in VALUES["place"] if (found := re.search(rf"\b{place}\b", caption))
    }
    place = max(spans, key=len, default="")
    start = spans[place][1] if place else 0
    if place and re.match(" of", caption[start:]):  # "at the top left of": the place is "at the top"
        place, start = place.rpartition(" ")[0], start - len(place.rpartition(" ")[2]) - 1
        place = place if place in VALUES["place"] else ""
    side = _SIDE.search(caption, start)
    head, tail = (caption[: side.start()], caption[side.end() :]) if side else (caption, "")

    def first(name: str, text: str) -> str:
        found = re.search(rf"\b{_any(name)}\b", text)
        return found[0] if found else ""

    own = [first(name, head) for name in ("size", "texture", "colour", "shape")]
    return Attributes(*own, place, side[0] if side else "", first("colour", tail), first("shape", tail))


def words() -> list[str]:
    """Every word of this world's captions, sorted; besides them there is the comma."""
    phrases = ["a", "an", *(value for values in VALUES.values() for value in values)]
    return sorted({word for phrase in phrases for word in phrase.split()})


# A world as source data.


def scenes(num_images: int, seed: int, options: Options, split: str = "train") -> Iterator[Scene]:
    """The scenes of a world, one by one; the first of a longer world are those of a shorter one."""
    if split not in SPLITS:
        raise ConfigError(f"split: {split!r} is none; take {' or '.join(SPLITS)}")
    taken: set[str] = set()
    for number in range(num_images):
        yield toy_scenes.draw_scene(seed, number, options, split, taken)


def write_world(
    folder: str | Path, num_images: int, seed: int, options: Options | None = None, split: str = "train"
) -> Path:
    """Write scenes with their truth as source data, and a configuration that builds a corpus from it.

    The same arguments give the same bytes with the same releases of OpenCV and Pillow; but `build.yaml` names
    the folder.

    Args:
        folder: created. Gets `photos/`, `panoptic/`, `panoptic.json`, `captions.json` (true captions by image
            key and segment id) and `build.yaml`, whose corpus goes into `corpus/`.
        num_images: of the world.
        seed: different seeds are different worlds; their scenes may coincide within a split.
        options: how hard the world is.
        split: "train" or "heldout".

    Returns:
        The path of `build.yaml`.

    Raises:
        ConfigError: the folder is not empty, or the options allow too few scenes.
    """
    folder, options = Path(folder).absolute(), options or Options()
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: not empty; name a new folder, or remove this one")
    for name in ("photos", "panoptic"):
        (folder / name).mkdir(parents=True)
    images, annotations, captions = [], [], {}
    for number, scene in enumerate(scenes(num_images, seed, options, split)):
        key = f"{split}-{seed}-{number:06d}"
        photo = f"{key}.{'jpg' if options.photo_format == 'jpeg' else 'png'}"
        pixels = toy_scenes.paint(scene, seed, number, options)
        _write_photo(folder / "photos" / photo, pixels)
        ids = _segment_ids(number, len(scene.things))
        _write_labels(folder / "panoptic" / f"{key}.png", scene, ids)
        images.append({"id": number, "file_name": photo, "width": scene.size[0], "height": scene.size[1]})
        segments = _segments(scene, ids)
        annotations.append({"image_id": number, "file_name": f"{key}.png", "segments_info": segments})
        said = map(say, truth(scene, options))
        captions[key] = {str(segment): caption for segment, caption in zip(ids, said, strict=True)}
    info = {"description": "toy world", "seed": seed, "split": split, "options": asdict(options)}
    document = {"info": info, "images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "panoptic.json").write_text(json.dumps(document) + "\n")
    (folder / "captions.json").write_text(json.dumps(captions, indent=1) + "\n")
    return _write_config(folder, options)


def _segment_ids(number: int, num_things: int) -> list[int]:
    """24-bit ids that differ between images, and use all three channels of the label PNG."""
    return [0x010203 + (4099 * (16 * number + i)) % 0xFE0000 for i in range(num_things)]


def _segments(scene: Scene, ids: Sequence[int]) -> list[dict[str, Any]]:
    found = []
    for number, (thing, segment) in enumerate(zip(scene.things, ids, strict=True), 1):
        rows, columns = np.nonzero(scene.labels == number)
        x, y = int(columns.min()), int(rows.min())
        box = [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y]
        category = SHAPES.index(thing.kind.shape) + 1
        info = {"id": segment, "category_id": category, "iscrowd": 0, "bbox": box, "area": len(rows)}
        found.append(info)
    return found


def _write_photo(path: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    options = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
    Image.fromarray(pixels).save(path, **options)


def _write_labels(path: Path, scene: Scene, ids: Sequence[int]) -> None:
    from PIL import Image

    colour = np.array([(0, 0, 0), *((each & 255, each >> 8 & 255, each >> 16) for each in ids)], np.uint8)
    Image.fromarray(colour[scene.labels]).save(path)


def _write_config(folder: Path, options: Options) -> Path:
    import yaml

    captioner = {
        "name": f"{TruthCaptioner.__module__}:{TruthCaptioner.__name__}",
        "options": {"captions": str(folder / "captions.json")},
    }
    source = {
        "source": "coconut",
        "annotations": ["panoptic.json"],
        "labels": "panoptic",
        "photos": ["photos"],
        "license": "CC0 (drawn by a program)",
    }
    config = {
        "out": "corpus",
        "subsets": {"coconut": {"sources": source}},
        "masks": {"min_area_px": int(options.unit_px**2 / 4)},  # below the smallest thing
        "captioner": captioner,
        "judge": {"name": "lexical"},
    }
    path = folder / "build.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


class TruthCaptioner:
    """A captioner that knows the truth.

    Args:
        captions: path of a world's `captions.json`.
    """

    def __init__(self, captions: str):
        self.path = captions
        self.captions: dict[str, dict[str, str]] = json.loads(Path(captions).read_text())

    @classmethod
    def identity(cls, captions: str) -> dict[str, str]:
        """Digest of the captions.

        Raises:
            ConfigError: no such file.
        """
        try:
            return {"captions": hashlib.sha256(Path(captions).read_bytes()).hexdigest()}
        except OSError as error:
            raise ConfigError(f"captioner.options.captions: {captions}: {error.strerror}") from error

    def caption(self, images: list[ImageRecord]) -> list[list[str | None]]:
        """The true caption of each live region, by the image's key and the region's segment id.

        Raises:
            ConfigError: a region that the world does not have.
        """
        return [[self._of(image.key, region.source_id) for region in image.live()] for image in images]

    def _of(self, key: str, segment: int | None) -> str:
        try:
            return self.captions[key][str(segment)]
        except KeyError as error:
            raise ConfigError(f"{self.path}: no caption of {key}/{segment}: it is another world's") from error


# Words as tokens.

_LLADA = (
    *(
        f"<|{name}|>"
        for name in "startoftext endoftext start_header_id end_header_id eot_id mdm_mask".split()
    ),
    *(f"<|reserved_token_{number}|>" for number in range(16)),
)
_PROMPT = f"system user assistant You are a helpful assistant. {CORRECTED.instruction}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for tiny models: this world's and the prompt's words are tokens, all else is bytes.

    It has the special tokens of LLaDA and of the model; `model.tokenizer.num_rows` and `special_token_ids`
    say what a model's config needs of it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from ..model.tokenizer import SPECIAL_TOKENS

    prompt = re.findall(r"\w+", _PROMPT)
    opening = ["system", "user", "assistant", "You", "Describe"]  # after a special token or a line break
    whole = dict.fromkeys([*opening, *(f"\u0120{word}" for word in (*words(), *prompt))])  # U+0120 is a space
    known = {
        token: number for number, token in enumerate((*sorted(pre_tokenizers.ByteLevel.alphabet()), *whole))
    }
    tokenizer = Tokenizer(models.BPE(vocab=known, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*_LLADA, *SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
