"""A small world with known truth, in which learning can be shown on a CPU.

`write_world` draws scenes and writes them as source data in COCONut's layout, with a `build.yaml` whose
captioner knows the truth. So all steps can be run: sources, filters, shards, trainer, decoder, benchmark.
`parse_caption` reads a model's caption, and `score_caption` tells plain errors from a neighbor's attributes.

    write_world("toy/train", 4000, seed=0)
    write_world("toy/heldout", 200, seed=0, split="heldout")
    paracaption build toy/train/build.yaml

A caption is "a small striped red circle". With `places` it goes on "... at the top left", and with
`relations` "..., right of an orange square", which is the nearest other thing. With `wordings="many"` it is
longer, and a thing has many right ones (wordings.py). No two scenes of a world hold the same things. No scene
of one split holds the same things as a scene of the other split, whatever their seeds and options are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...schemas.errors import ConfigError
from ..model.layout import CORRECTED
from . import wordings
from .scenes import (
    COLORS,
    PLACES,
    SHAPES,
    SIDES,
    SIZES,
    SPLITS,
    TEXTURES,
    Scene,
    WorldOptions,
    draw_scene,
    nearest_thing,
    paint_scene,
    place_of,
    wording_rng,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ...schemas.records import ImageRecord

EASY = WorldOptions(
    canvas=((96, 96),),
    unit_px=16.0,
    shapes=("circle", "triangle", "bar"),
    textures=("plain", "striped", "dotted"),
    turn_deg=10.0,
    noise=3.0,
)
"""The world of configs/train/tiny.yaml: few kinds of things on small photos."""

HARD = replace(
    EASY,
    shapes=("circle", "triangle", "bar", "ring"),
    regions=(2, 4),
    overlap=0.25,
    tangled=0.4,
    wordings="many",
)
"""The world in which fewer decoding steps are measured: long captions with many right wordings, and things
that overlap, share a box or lie inside of each other. Its things look like those of `EASY`."""

CATEGORIES = [{"id": number, "name": shape, "isthing": 1} for number, shape in enumerate(SHAPES, 1)]


class Attributes(NamedTuple):
    """What a caption says about a thing. An attribute that it does not mention is "".

    Attributes:
        size, texture, colour, shape: what the thing looks like.
        place: the ninth of the image that it is in.
        side: the side of the nearest other thing that it is on.
        near_colour, near_shape: what that other thing looks like.
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
    "colour": tuple(COLORS),
    "shape": SHAPES,
    "place": tuple(place for row in PLACES for place in row),
    "side": SIDES,
    "near_colour": tuple(COLORS),
    "near_shape": SHAPES,
}
"""The values of each attribute."""


class CaptionScore(NamedTuple):
    """How a caption compares with the truth.

    Attributes:
        exact: whether it says the whole truth and nothing else.
        wrong: attributes that it has wrong or does not mention.
        leaked: those of the wrong ones that are right for a neighbor.
        by_chance: expected number of leaked attributes if wrong values were drawn at random from all wrong
            values. Only leakage above this number shows confusion of regions.
    """

    exact: bool
    wrong: tuple[str, ...] = ()
    leaked: tuple[str, ...] = ()
    by_chance: float = 0.0


def true_attributes(scene: Scene, options: WorldOptions) -> list[Attributes]:
    """The true attributes of each thing in a scene, as far as the options let captions mention them."""
    found = []
    for number, thing in enumerate(scene.things):
        attributes = Attributes(*thing.kind)
        if options.places:
            attributes = attributes._replace(place=place_of(scene, number))
        if options.relations:
            side, other = nearest_thing(scene, number)
            kind = scene.things[other].kind
            attributes = attributes._replace(side=side, near_colour=kind.colour, near_shape=kind.shape)
        found.append(attributes)
    return found


def format_caption(attributes: Attributes) -> str:
    """The caption that mentions these attributes; `parse_caption` is the inverse."""
    caption = f"a {' '.join(attributes[:4])}"
    if attributes.place:
        caption += f" {attributes.place}"
    if attributes.side:
        article = "an" if attributes.near_colour[:1] in "aeiou" else "a"
        near = f"{attributes.side} {article} {attributes.near_colour} {attributes.near_shape}"
        caption += f"{',' if attributes.place else ''} {near}"
    return caption


def true_captions(scene: Scene, seed: int, number: int, options: WorldOptions) -> list[str]:
    """A right caption of each thing in scene `number` of a world; of many wordings one is drawn."""
    truths = true_attributes(scene, options)
    if options.wordings == "one":
        return [format_caption(attributes) for attributes in truths]
    rng = wording_rng(seed, number)
    return [wordings.draw_wording(wordings.facts_of(*each[:5]), rng, options.textures) for each in truths]


def _any(name: str, group: str | None = None) -> str:
    return f"(?P<{group or name}>{'|'.join(VALUES[name])})"


_CAPTION = re.compile(
    rf"a {_any('size')} {_any('texture')} {_any('colour')} {_any('shape')}(?: {_any('place')})?"
    rf"(?:(?(place),) {_any('side')} an? {_any('near_colour')} {_any('near_shape')})?"
)
_SIDE = re.compile(rf"\b{_any('side')}\b")


def parse_caption(caption: str) -> Attributes | None:
    """The attributes that a caption mentions; None if `format_caption` could not have written it."""
    found = _CAPTION.fullmatch(caption.strip())
    if not found:
        return None
    attributes = Attributes(**found.groupdict(default=""))
    return attributes if format_caption(attributes) == caption.strip() else None


def score_caption(predicted: str, truth: str, neighbors: Iterable[str]) -> CaptionScore:
    """Compare a caption with the truth, and with what is true of the other regions in its image.

    Args:
        predicted: any text. A text that does not parse is never exact; attributes are searched in it.
        truth: the region's true caption.
        neighbors: the true captions of the image's other regions.

    Raises:
        ValueError: a true caption does not parse.
    """
    right, *others = (_parse_truth(caption) for caption in (truth, *neighbors))
    found = parse_caption(predicted)
    if found == right:
        return CaptionScore(True)
    found = found or _search_attributes(predicted)
    wrong, leaked, by_chance = [], [], 0.0
    for name, each, correct in zip(Attributes._fields, found, right, strict=True):
        if each == correct:
            continue
        wrong.append(name)
        theirs = {getattr(other, name) for other in others} - {correct, ""}
        if each:
            by_chance += len(theirs) / (len(VALUES[name]) - bool(correct))
        if each in theirs:
            leaked.append(name)
    return CaptionScore(False, tuple(wrong), tuple(leaked), by_chance)


def _parse_truth(caption: str) -> Attributes:
    attributes = parse_caption(caption)
    if attributes is None:
        raise ValueError(f"{caption!r} is not a true caption of a toy world; give a toy world's corpus")
    return attributes


def _search_attributes(caption: str) -> Attributes:
    """The first word or phrase for each attribute. What follows the side belongs to the other thing."""
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

    return Attributes(
        size=first("size", head),
        texture=first("texture", head),
        colour=first("colour", head),
        shape=first("shape", head),
        place=place,
        side=side[0] if side else "",
        near_colour=first("colour", tail),
        near_shape=first("shape", tail),
    )


def caption_words() -> list[str]:
    """All words of captions with one wording, sorted. They hold nothing else but commas."""
    phrases = ["a", "an", *(value for values in VALUES.values() for value in values)]
    return sorted({word for phrase in phrases for word in phrase.split()})


# A world as source data.


def draw_scenes(num_images: int, seed: int, options: WorldOptions, split: str = "train") -> Iterator[Scene]:
    """Draw the scenes of a world, one by one. A longer world begins with the scenes of a shorter one."""
    if split not in SPLITS:
        raise ConfigError(f"split: unknown split {split!r}; choose {' or '.join(SPLITS)}")
    taken: set[str] = set()
    for number in range(num_images):
        yield draw_scene(seed, number, options, split, taken)


def write_world(
    folder: str | Path, num_images: int, seed: int, options: WorldOptions | None = None, split: str = "train"
) -> Path:
    """Write scenes with their truth as source data, and a configuration that builds a corpus from them.

    With the same releases of OpenCV and Pillow, the same arguments give the same bytes, except that
    `build.yaml` holds the folder's path.

    Args:
        folder: is created. It gets `photos/`, `panoptic/`, `panoptic.json`, `captions.json` (true captions by
            image key and segment id) and `build.yaml`, whose corpus goes into `corpus/`.
        num_images: number of scenes.
        seed: different seeds give different worlds; some of their scenes may be equal within a split.
        options: how hard the world is; None takes the defaults.
        split: "train" or "heldout".

    Returns:
        The path of `build.yaml`.

    Raises:
        ConfigError: the folder is not empty, or the options allow too few scenes.
    """
    folder, options = Path(folder).absolute(), options or WorldOptions()
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: the folder is not empty; name a new one, or remove this one")
    for name in ("photos", "panoptic"):
        (folder / name).mkdir(parents=True)
    images, annotations, captions = [], [], {}
    for number, scene in enumerate(draw_scenes(num_images, seed, options, split)):
        key = f"{split}-{seed}-{number:06d}"
        photo = f"{key}.{'jpg' if options.photo_format == 'jpeg' else 'png'}"
        pixels = paint_scene(scene, seed, number, options)
        _write_photo(folder / "photos" / photo, pixels)
        ids = _segment_ids(number, len(scene.things))
        _write_labels(folder / "panoptic" / f"{key}.png", scene, ids)
        images.append({"id": number, "file_name": photo, "width": scene.size[0], "height": scene.size[1]})
        segments = _segments(scene, ids)
        annotations.append({"image_id": number, "file_name": f"{key}.png", "segments_info": segments})
        truths = true_captions(scene, seed, number, options)
        captions[key] = {str(segment): caption for segment, caption in zip(ids, truths, strict=True)}
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

    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
    Image.fromarray(pixels).save(path, **options)


def _write_labels(path: Path, scene: Scene, ids: Sequence[int]) -> None:
    from PIL import Image

    colors = np.array([(0, 0, 0), *((each & 255, each >> 8 & 255, each >> 16) for each in ids)], np.uint8)
    Image.fromarray(colors[scene.labels]).save(path)


def _write_config(folder: Path, options: WorldOptions) -> Path:
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
    """A captioner for builds that knows the truth.

    Args:
        captions: path of a world's `captions.json`.
    """

    def __init__(self, captions: str):
        self.path = captions
        self.captions: dict[str, dict[str, str]] = json.loads(Path(captions).read_text())

    @classmethod
    def identity(cls, captions: str) -> dict[str, str]:
        """A digest of the captions, which is part of the evidence's identity.

        Raises:
            ConfigError: there is no such file.
        """
        try:
            return {"captions": hashlib.sha256(Path(captions).read_bytes()).hexdigest()}
        except OSError as error:
            raise ConfigError(f"captioner.options.captions: {captions}: {error.strerror}") from error

    def caption(self, images: list[ImageRecord]) -> list[list[str | None]]:
        """The true captions of the live regions, found by the image's key and the region's segment id.

        Raises:
            ConfigError: the world does not have such a region.
        """
        return [[self._of(image.key, region.source_id) for region in image.live()] for image in images]

    def _of(self, key: str, segment: int | None) -> str:
        try:
            return self.captions[key][str(segment)]
        except KeyError as error:
            raise ConfigError(
                f"{self.path}: no caption for {key}/{segment}, which is from another world; "
                "name that world's captions.json"
            ) from error


# A tokenizer whose tokens are words.

_LLADA = (
    *(
        f"<|{name}|>"
        for name in "startoftext endoftext start_header_id end_header_id eot_id mdm_mask".split()
    ),
    *(f"<|reserved_token_{number}|>" for number in range(16)),
)
_PROMPT = f"system user assistant You are a helpful assistant. {CORRECTED.instruction}"


def make_tokenizer(more_words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer for tiny models. The words of these worlds and of the prompt are tokens; the rest is bytes.

    `more_words` are tokens too, both after a space and where a text begins.

    It has the special tokens of LLaDA and of PerceptionDLM. `num_rows` and `special_token_ids` in
    model/tokenizer.py give what a model's config needs to know about it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from ..model.tokenizer import SPECIAL_TOKENS

    prompt = re.findall(r"\w+", _PROMPT)
    opening = [
        "system",
        "user",
        "assistant",
        "You",
        "Describe",
        "this",
    ]  # after a special token or a line break
    words = (*caption_words(), *prompt, *wordings.WORDING_WORDS)
    opening += more_words
    whole = dict.fromkeys(
        [*opening, *(f"\u0120{word}" for word in (*words, *more_words))]
    )  # U+0120 is a space
    every = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *whole])  # "a" is a byte, too
    known = {token: number for number, token in enumerate(every)}
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
