"""Captions of a folder of photos, or of a corpus, as JSON lines; a run that was stopped is continued.

    captions.jsonl            a line for each photo, in the order of the photos
    captions.jsonl.run.json   what the captions depend on: photos, masks, model, options, prompt

A line is written when it is its photo's turn, whole or not at all. A later run skips the photos that have a
line. A photo that cannot be used gets a line with `error` instead of captions, and is tried again by a later
run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...filters.held_out import is_held_out
from ...pipeline.corpus import reader
from ...pipeline.io import files, mask_images, weights
from ...pipeline.io.json_lines import LineWriter
from ...pipeline.models.batching import Batches
from ...pipeline.sources import file_names
from ...schemas.decoding import DecodeOptions
from ...schemas.errors import ConfigError
from .caption_photo import about_captions, to_record
from .corpus_captioner import isolates_prefix
from .fitting import caption_each
from .read_regions import PhotoRegions, check_json, is_corpus, of_sample, read_photo_regions
from .region_captioner import RegionCaptioner
from .region_forms import to_masks

if TYPE_CHECKING:
    import pyarrow as pa

_SYNC_EVERY_S = 5.0
"""Seconds after which what was written is made to outlive the end of the machine."""

_NOT_IN_LINES = ("model", "options", "seconds")
"""Of a photo's record: what is the same for all photos, and what no two runs have in common."""


_PLACE = ["subset", "shard", "key", "photo_offset", "photo_length", "json_offset", "json_length"]
"""Columns of a ledger that say where an image lies."""


class PhotoTask(NamedTuple):
    """A photo to caption: its name in the lines, and how it is read."""

    name: str
    read: Callable[[], PhotoRegions]


class Captioned(NamedTuple):
    """What a run has done.

    Attributes:
        photos: captioned ones.
        regions: captioned ones.
        left_out: records of masks that cannot be used.
        failed: photos that cannot be used.
    """

    photos: int
    regions: int
    left_out: int
    failed: int


def find_photos(photos: str | None, masks: str) -> list[PhotoTask]:
    """The photos of a folder with their masks, by name, or all images of a corpus, shard by shard.

    Args:
        photos: folder of photos; None for a corpus.
        masks: a corpus; a JSON with the regions of all photos; or a folder that has for each photo STEM.EXT
            an image STEM.png (or of another format), a JSON STEM.json, or a folder STEM of mask images.

    Raises:
        ConfigError: there is no such folder, no photo in it, a photo or a mask has no partner, or the JSON is
            damaged.
        IntegrityError: the corpus is damaged.
    """
    for given in filter(None, (photos, masks)):
        if file_names.ending(given) == ".tar" and not files.is_folder(given):
            raise ConfigError(
                f"{given}: a tar; if it is a shard of a corpus, give the corpus's folder with --masks and "
                "no --image; else unpack it, and give the folder"
            )
    if is_corpus(masks):
        if photos is not None:
            raise ConfigError(f"{masks}: a corpus has its own photos; give it alone, without --image")
        return tasks_of_corpus(masks)
    if photos is None:
        raise ConfigError(f"{masks}: these masks need their photos; give their folder with --image")
    named = _by_stem(photos, file_names.PHOTO_ENDINGS, "photos")
    if not named:
        raise ConfigError(f"{photos}: no photos; their names end in {', '.join(file_names.PHOTO_ENDINGS)}")
    if file_names.ending(masks) == ".json" and not files.is_folder(masks):
        check_json(masks, [f"{photos.rstrip('/')}/{name}" for _, name in sorted(named.items())])
        found = {stem: masks for stem in named}
    else:
        endings = (*mask_images.ENDINGS, ".json")
        found = {
            stem: f"{masks.rstrip('/')}/{name}" for stem, name in _by_stem(masks, endings, "masks").items()
        }
    _refuse_single(photos, masks, named, found)
    home = photos.rstrip("/")
    return [
        PhotoTask(name, partial(read_photo_regions, f"{home}/{name}", [found[stem]], may_be_empty=True))
        for stem, name in sorted(named.items(), key=lambda each: each[1])
    ]


def tasks_of_corpus(path: str, held_out: bool = False) -> list[PhotoTask]:
    """A task for each image of a corpus, named SUBSET/KEY, since an image may be in several subsets.

    Each is read by itself, from where its ledger says that it lies.

    Args:
        path: path of the folder that a build wrote.
        held_out: only the images that are held out of training, if the corpus holds any out.

    Raises:
        ConfigError: the folder is no corpus.
        IntegrityError: the corpus is damaged.
    """
    opened = reader.open_corpus(path)
    share = opened.held_out_share if held_out else 0.0
    rows: dict[tuple[str, str], tuple[pa.Table, int]] = {}
    for subset in opened.subsets:
        for table in opened.ledgers(subset, columns=["kept", *_PLACE]):
            kept = table.filter(table["kept"]).select(_PLACE)
            rows |= {(subset, key): (kept, number) for number, key in enumerate(kept["key"].to_pylist())}

    def read(table: pa.Table, number: int) -> PhotoRegions:
        [row] = table.slice(number, 1).to_pylist()
        return of_sample(f"{path}#{row['key']}", *opened.read_sample(row))

    return [
        PhotoTask(f"{subset}/{key}", partial(read, *row))
        for (subset, key), row in rows.items()
        if not share or is_held_out(key, share)
    ]


def caption_folder(
    captioner: RegionCaptioner,
    tasks: Sequence[PhotoTask],
    out: Path,
    options: DecodeOptions,
    *,
    prompt: str | None = None,
    regions_per_call: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Captioned:
    """Caption the photos that have no line yet, and append their lines.

    Args:
        captioner: the model.
        tasks: the photos that have no line yet, see `caption_lines.unfinished`.
        out: the file of JSON lines.
        options: how captions are decoded.
        prompt: what the regions are asked; None asks what the model was trained with.
        regions_per_call: the most regions that share a sequence; by default as many as the model can.
        batch_size: sequences that are decoded at once; halved when memory runs out.
        progress: called after each photo with the number of photos that are done.

    Raises:
        ConfigError: an option does not suit the model.
        OSError: a line cannot be written, or a photo cannot be read for now.
        OutOfMemory: one sequence does not fit.
    """
    photos = regions = left_out = failed = 0
    synced = time.monotonic()
    with LineWriter(out) as lines:
        found = caption_each(
            captioner,
            tasks,
            _read,
            Batches(batch_size, "captions: sequences of regions"),
            options,
            prompt=prompt,
            regions_per_call=regions_per_call,
        )
        for (name, photo), each in found:
            if isinstance(photo, ConfigError):
                failed += 1
                lines.append({"photo": name, "error": str(photo)})
            else:
                photos, regions = photos + 1, regions + len(photo.regions)
                left_out += len(photo.left_out)
                asked = [prompt] * len(photo.regions) if prompt is not None else []
                record = to_record(about_captions(captioner, photo, each, options, asked))
                kept = {key: value for key, value in record.items() if key not in _NOT_IN_LINES}
                lines.append(kept | {"photo": name})
            if time.monotonic() - synced > _SYNC_EVERY_S:
                lines.sync()
                synced = time.monotonic()
            if progress:
                progress(photos + failed)
        lines.sync()
    return Captioned(photos, regions, left_out, failed)


def header_of(
    model: Path,
    dtype: str,
    options: DecodeOptions,
    prompt: str | None,
    regions_per_call: int | None,
    photos: str | None,
    masks: str,
) -> dict[str, Any]:
    """What captions depend on. Photos and masks count by where they are, not by what is in them."""
    return {
        "photos": photos and _place(photos),
        "masks": _place(masks),
        **({"names of images": "subset/key"} if photos is None else {}),  # once some were named by key alone
        "model": weights.identity(model),
        "dtype": dtype,
        "options": options.resolved(isolates_prefix(model)).stored(),
        "prompt": prompt,
        "regions_per_call": regions_per_call,
    }


def _place(path: str) -> str:
    return path if files.is_url(path) else str(Path(path).resolve())


def _read(task: PhotoTask) -> tuple[tuple[str, PhotoRegions | ConfigError], np.ndarray, list[np.ndarray]]:
    """What a photo's line says, its pixels and its masks; if it cannot be used, the error and no masks."""
    try:
        photo = task.read()
        masks = to_masks(photo.masks(), photo.pixels.shape[:2])
    except ConfigError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise  # it may be readable again, and nothing is to be written about it
        return (task.name, error), np.zeros((1, 1, 3), np.uint8), []
    return (task.name, photo.without_pixels()), photo.pixels, masks


def _by_stem(folder: str, endings: tuple[str, ...], what: str) -> dict[str, str]:
    """The names in a folder by their stems; hidden ones are passed over."""
    if not files.is_folder(folder):
        if not files.is_url(folder) and Path(folder).exists():
            raise ConfigError(
                f"{folder}: a file; give the folder of {what}, or leave out --out for one photo"
            )
        raise ConfigError(f"{folder}: no such folder of {what}; correct the path")
    found: dict[str, str] = {}
    for name in files.list_names(folder):
        if name.startswith("."):
            continue
        is_folder = files.is_folder(f"{folder.rstrip('/')}/{name}")
        if is_folder and what == "photos":
            raise ConfigError(f"{folder}: {name} is a folder; give a folder that has photos alone")
        if not is_folder and not name.lower().endswith(endings):
            raise ConfigError(
                f"{folder}: {name} is not one of the {what}, which end in {', '.join(endings)}; move it"
            )
        stem = name.rstrip("/") if is_folder else file_names.stem(name)
        if stem in found:
            raise ConfigError(
                f"{folder}: {found[stem]} and {name} have one stem; rename or remove one of them"
            )
        found[stem] = name
    return found


def _refuse_single(photos: str, masks: str, named: dict[str, str], found: dict[str, str]) -> None:
    """Refuse photos without masks, and masks without a photo."""
    missing = [named[stem] for stem in sorted(named.keys() - found.keys())]
    left = [file_names.base_name(found[stem]) for stem in sorted(found.keys() - named.keys())]
    if missing or left:
        told = [
            f"{place}: {len(names):,} without {what}: {', '.join(names[:5])}{', ...' * (len(names) > 5)}"
            for place, names, what in ((photos, missing, "masks"), (masks, left, "a photo"))
            if names
        ]
        raise ConfigError(f"{'; '.join(told)}. Photos and masks are paired by their names without the ending")
