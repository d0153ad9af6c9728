"""Questions and answers on whole images or on none, and region data of the released code, as items.

The records are copied once into a table in the cache, because a single record can be read neither from JSON
nor from Parquet. Photos that are embedded in Parquet are copied too; photos in files stay where they are.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
from msgspec import UNSET

from ...pipeline.io import files, photos
from ...pipeline.io.orientation import unturned
from ...schemas.errors import BadRecord, BadSample, ConfigError
from ...schemas.records import Blob
from ...schemas.training import ConversationSource, DataOptions
from ..model import conversation, tiling
from ..model.batch import Example
from ..model.layout import IMAGE
from . import left_out
from .conversation_records import SPEAKERS, Found, Record, Turn, list_files, read_records
from .corpus import token_lists, tokenizer_digest, views_of
from .table import Table, TableWriter, cached_folder

if TYPE_CHECKING:
    from PIL import Image

    from ..model.processor import PerceptionDLMProcessor

_VERSION = 3
_ROW = np.dtype(
    [
        *(("record", "u8"), ("record_bytes", "u4"), ("photo", "u8"), ("photo_bytes", "u4")),
        *(("prefix", "u4"), ("answer", "u4")),
    ]
)
"""`photo_bytes` is 0 if the photos are files or missing."""

_AT_ONCE = 1024
_PROBES = 16


class ConversationTokens(NamedTuple):
    """A conversation as tokens.

    Attributes:
        prefix: tokens before the first answer.
        answer: tokens from the first answer on, later questions included.
        labels: for each of `answer`, whether it is learned.
    """

    prefix: list[int]
    answer: list[int]
    labels: list[bool]


class Conversations:
    """The conversations and groups of regions of a source's files. Each of them is an item."""

    def __init__(self, table: Table, source: ConversationSource):
        self.table, self.source = table, source

    @property
    def num_items(self) -> int:
        """Number of conversations and groups of regions."""
        return len(self.table.rows)

    @property
    def fingerprint(self) -> str:
        """Identifies the items: it changes when they do."""
        return self.table.about["digest"]

    @property
    def left_out(self) -> dict[str, int]:
        """Number of records that are not trained on because of their photo, by reason."""
        return self.table.about.get("left_out", {})

    def lengths(self, items: np.ndarray, passes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of items before and from the first answer on: (N,) int64 each, the same in all passes."""
        rows = self.table.rows[items]
        return rows["prefix"].astype(np.int64), rows["answer"].astype(np.int64)

    def read_record(self, item: int, max_pixels: int) -> tuple[Record, list[Image.Image], str]:
        """An item's record, its photos, and its name for messages.

        Args:
            item: index of the item.
            max_pixels: most pixels of a photo.

        Raises:
            BadSample: the record cannot be trained on, or a photo is missing or broken.
        """
        row = self.table.rows[item]
        data = self.table.bytes_at(int(row["record"]), int(row["record_bytes"]))
        record = msgspec.json.decode(data, type=Record)
        name = self._name(item, record)
        if record.problem is not UNSET:
            raise BadSample(record.problem[0], f"{name}: {record.problem[1]}")
        found: list[Image.Image] = []
        blob, start = Blob(name), int(row["photo"])
        try:
            for path, length in _photos(record, int(row["photo_bytes"])):
                blob = Blob(name) if length else Blob(_path(self.source, path, name))
                photo = self.table.bytes_at(start, length) if length else files.read(blob)
                start += length
                found.append(photos.decode_image(blob, photo, max_pixels))
        except OSError as error:
            detail = f"{name}: {blob}: {error.strerror or error}; put it there or correct `images`"
            raise BadSample("photo_missing", detail) from error
        except BadRecord as error:
            raise BadSample(str(error.reason), f"{name}: {error.detail}") from error
        return record, found, name

    def _name(self, item: int, record: Record) -> str:
        read = self.table.about["files"]
        path, start = read[bisect_right([first for _, first in read], item) - 1]
        return f"{path}: {item - start if record.id is None else record.id}"


def open_conversations(
    source: ConversationSource, processor: PerceptionDLMProcessor, options: DataOptions, cache: Path
) -> Conversations:
    """Open files of conversations through their table in the cache, which is written if it is missing.

    Args:
        source: the files, and the folder of their photos.
        processor: the model's processor.
        options: how images with regions are cut into groups, how long captions are, and whether the photos of
            benchmarks are left out.
        cache: local folder of the tables.

    Raises:
        ConfigError: a file is missing, or its form is unknown.
    """
    paths = list_files(source.path)
    try:
        versions = [(path, files.version(path)) for path in paths]
    except OSError as error:
        raise ConfigError(
            f"{source.path}: {error.strerror or error}; give a file of conversations"
        ) from error
    config = processor.config
    facts = (_VERSION, source.path, source.images, versions, tokenizer_digest(processor))
    facts += (config.tile_px, config.tokens_per_tile, config.max_tiles, config.replay_tokens)
    facts += (options.regions_per_group, options.caption_length, options.caption_limit())
    if options.benchmark_photos == "leave_out":
        facts += (left_out.BENCHMARK_PHOTOS, left_out.list_digest())
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def write(folder: Path) -> None:
        _write(folder, source, paths, processor, options)

    folder = cached_folder(cache, f"conversations-{name}", write)
    return Conversations(Table(folder, _ROW), source)


def tokenize_conversation(
    record: Record,
    views: list[int],
    processor: PerceptionDLMProcessor,
    encode: Callable[[str], list[int]],
    name: str,
) -> ConversationTokens:
    """A conversation as tokens. All answers are labeled, and so is the end token after each.

    Images stand where the questions say; if they do not say, all stand before the first one. A question
    without an answer at the end, or with an empty one, is left out, because nothing is learned from it.

    Args:
        record: human and gpt take turns in it.
        views: number of views of each of its photos.
        processor: the model's processor.
        encode: turns a text into tokens, none of them special.
        name: the record's name for messages.

    Raises:
        BadSample: the turns are out of order, there is no answer or an empty one before others, or the
            questions name more or fewer images than there are.
    """
    turns = _answered(record.conversations, name)
    questions = [turn.value for turn in turns[::2]]
    if places := sum(question.count(IMAGE) for question in questions):
        _check_places(places, len(views), name)
    parts = conversation.lay_out(processor, questions, views, conversation.TRAINED, encode)
    tokens = ConversationTokens(parts[0], [], [])
    for number, turn in enumerate(turns[1::2]):
        asked = parts[number] if number else []
        answer = [*encode(turn.value), processor.config.eot_token_id]
        tokens.answer.extend([*asked, *answer])
        tokens.labels.extend([False] * len(asked) + [True] * len(answer))
    return tokens


def _answered(turns: list[Turn], name: str) -> list[Turn]:
    """The turns without questions at the end that have no answer, or an empty one."""
    if len(turns) % 2 and SPEAKERS.get(turns[-1].speaker) == "human":
        turns = turns[:-1]
    speakers = [SPEAKERS.get(turn.speaker) for turn in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise BadSample(
            "conversation_unusable", f"{name}: human and gpt have to take turns; correct the record"
        )
    while turns and not turns[-1].value.strip():
        turns = turns[:-2]
    empty = [number for number, turn in enumerate(turns[1::2], start=1) if not turn.value.strip()]
    if empty or not turns:
        what = f"answer {empty[0]} is empty" if empty else "it has no answer"
        detail = f"{name}: {what}, which would teach the model to say nothing; correct the record"
        raise BadSample("conversation_unusable", detail)
    return turns


def _check_places(places: int, images: int, name: str) -> None:
    if not images:
        detail = f"{name}: a question shows {IMAGE}, but the record names no image; add it as `image`"
        raise BadSample("conversation_without_image", detail)
    if places != images:
        detail = f"{name}: {images} images, but {IMAGE} stands {places} times; correct the record"
        raise BadSample("conversation_unusable", detail)


def make_conversation_example(
    record: Record, shown: list[Image.Image], processor: PerceptionDLMProcessor, name: str
) -> tuple[Example, np.ndarray]:
    """The training example of a conversation, which has no regions.

    Returns:
        The example, and (L,) bool, which of the tokens of its answers are labeled.

    Raises:
        BadSample: the record is not usable, as in `tokenize_conversation`.
    """
    views, grids = conversation.cut_photos(processor, shown)
    counts = [tiling.num_views(grid) for grid in grids]
    tokens = tokenize_conversation(
        record, counts, processor, lambda text: token_lists(processor, [text])[0], name
    )
    example = conversation.make_example(processor, views, grids, tokens.prefix, tokens.answer)
    return example, np.array(tokens.labels)


def _photos(record: Record, photo_bytes: int) -> list[tuple[str, int]]:
    """The path of each photo, and its number of bytes if it is embedded, else 0."""
    if record.images is not UNSET and record.photo_bytes is not UNSET:
        return list(zip(record.images, record.photo_bytes, strict=True))
    return [(record.image or "", photo_bytes)] if record.image or photo_bytes else []


def _path(source: ConversationSource, name: str, record: str) -> str:
    """Where a photo lies that a record names; messages call the record `record`.

    A leading folder that repeats the name of the photos' folder is dropped, as in the released code, unless
    the photo lies in a folder of that name.
    """
    folder = source.images.rstrip("/")
    inside = name.removeprefix(f"{folder}/") if source.images else name
    if inside.startswith("/") or "://" in inside or ".." in inside.split("/"):
        fix = "correct the path in the record, or set `images` to the folder that has the photo"
        detail = f"{record}: {name} leads out of the folder `images`; {fix}"
        raise BadSample("unsafe_name", detail)
    if not source.images:
        return inside
    path = f"{folder}/{inside}"
    first, _, rest = inside.partition("/")
    if rest and first == folder.rpartition("/")[2] and not files.exists(path):
        return f"{folder}/{rest}"
    return path


def _write(
    folder: Path,
    source: ConversationSource,
    paths: list[str],
    processor: PerceptionDLMProcessor,
    options: DataOptions,
) -> None:
    writer, digest, omitted = TableWriter(folder), hashlib.sha256(), 0
    starts: list[tuple[str, int]] = []
    with ThreadPoolExecutor(_PROBES) as pool:
        for path in paths:
            starts.append((path, writer.num_rows))
            records = read_records(path, options.regions_per_group)
            while some := list(itertools.islice(records, _AT_ONCE)):
                sizes = list(pool.map(lambda found: _sizes(source, found), some))
                if options.benchmark_photos == "leave_out":
                    of_them = [_of_benchmark(*pair) for pair in zip(some, sizes, strict=True)]
                    omitted += sum(found.first for found in itertools.compress(some, of_them))
                    stays = [not each for each in of_them]
                    some, sizes = (
                        list(itertools.compress(some, stays)),
                        list(itertools.compress(sizes, stays)),
                    )
                _keep_numbers(some, writer.num_rows - starts[-1][1])
                rows = _rows(some, _views(sizes, processor), processor, options, writer)
                digest.update(rows.tobytes() + b"".join(msgspec.json.encode(found.record) for found in some))
                writer.add(rows)
    counted = {left_out.BENCHMARK_PHOTOS: omitted} if omitted else {}
    if not writer.num_rows and omitted:
        raise ConfigError(
            f"{source.path}: nothing is left to train on after leaving out {left_out.said(counted)}"
        )
    if not writer.num_rows:
        raise ConfigError(f"{source.path}: no conversation in it; name another file")
    about = {"digest": digest.hexdigest(), "files": starts}
    writer.close(about | ({"left_out": counted} if counted else {}))


def _of_benchmark(found: Found, sizes: list[tuple[int, int] | None]) -> bool:
    """Whether a record is about a photo of a benchmark, by the name of its file and by its id."""
    number = found.number if len(found.names) == 1 else None
    pairs = zip(found.names, sizes or [None] * len(found.names), strict=True)
    return any(left_out.is_benchmark(name, size or (None, None), number) for name, size in pairs)


def _keep_numbers(some: list[Found], first: int) -> None:
    """Give records without an id their number in the file, where their item has another one."""
    for item, found in enumerate(some, first):
        if found.record.id is None and found.place != item:
            found.record.id = found.place


def _views(sizes: list[list[tuple[int, int] | None]], processor: PerceptionDLMProcessor) -> list[list[int]]:
    """Numbers of views of each record's photos; the most there can be of one that cannot be read."""
    known = np.array([size for each in sizes for size in each if size], np.int64).reshape(-1, 2)
    views: Iterator[int] = iter(views_of(known, processor).tolist() if len(known) else [])
    most = tiling.num_views((processor.config.max_tiles, 1))
    return [[next(views) if size else most for size in each] for each in sizes]


def _rows(
    some: list[Found],
    views: list[list[int]],
    processor: PerceptionDLMProcessor,
    options: DataOptions,
    writer: TableWriter,
) -> np.ndarray:
    texts: dict[str, None] = {"": None}
    for found in some:
        for turn in found.record.conversations:
            texts |= dict.fromkeys([turn.value, *turn.value.split(IMAGE)])
        texts |= dict.fromkeys(region.caption for region in found.record.regions or ())
    tokens = dict(zip(texts, token_lists(processor, list(texts)), strict=True))
    rows = np.zeros(len(some), _ROW)
    last, place = b"", 0
    for row, (record, photo, *_), counts in zip(rows, some, views, strict=True):
        try:
            if record.regions is not UNSET:
                row["prefix"] = processor.make_prefix(sum(counts), len(record.regions)).shape[1]
                lengths = [len(tokens[region.caption]) for region in record.regions]
                row["answer"] = sum(2 + _caption_length(length, options) for length in lengths)
            else:
                made = tokenize_conversation(record, counts, processor, tokens.__getitem__, "")
                row["prefix"], row["answer"] = len(made.prefix), len(made.answer)
        except BadSample:
            row["prefix"] = 1  # the error is raised, with the record's name, when the item is read
        data = msgspec.json.encode(record)
        row["record"], row["record_bytes"] = writer.put(data), len(data)
        if not photo or photo is not last:  # groups of one image share its photo
            last, place = photo, writer.put(photo)
        row["photo"], row["photo_bytes"] = place, len(photo)
    return rows


def _caption_length(length: int, options: DataOptions) -> int:
    if options.caption_length == "fixed":
        return options.max_new_tokens
    limit = options.caption_limit()
    return length if limit is None else min(length, limit)


def _sizes(source: ConversationSource, found: Found) -> list[tuple[int, int] | None]:
    """Width and height of a record's photos; None for one that cannot be read."""
    sizes, start = [], 0
    for path, length in _photos(found.record, len(found.photo)):
        sizes.append(_size(source, path, found.photo[start : start + length]))
        start += length
    return sizes


def _size(source: ConversationSource, path: str, photo: bytes) -> tuple[int, int] | None:
    from PIL import Image

    try:
        if photo:
            with photos.quiet(), Image.open(io.BytesIO(unturned(photo)), formats=photos.FORMATS) as opened:
                return opened.size
        header = photos.probe(Blob(_path(source, path, "")), 1 << 40)
        return header.width, header.height
    except (BadRecord, BadSample, *photos.BROKEN):
        return None
