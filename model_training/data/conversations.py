"""Questions and answers on whole images, in the form of LLaVA's data, as items beside those of a corpus.

The records are copied once into a table in the cache, because a single record can be read neither from JSON
nor from Parquet. Photos that are embedded in Parquet are copied too; photos in files stay where they are.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from ...pipeline.io import files, photos
from ...pipeline.io.tables import TableFile
from ...pipeline.io.orientation import unturned
from ...schemas.errors import BadRecord, BadSample, ConfigError
from ...schemas.records import Blob
from ...schemas.training import ConversationSource
from ..model import tiling
from ..model.attention import SHARED
from ..model.batch import Example
from ..model.processor import ANSWER, HEAD
from . import left_out
from .corpus import token_lists, tokenizer_digest, views_of
from .table import Table, TableWriter, cached_folder

if TYPE_CHECKING:
    from PIL import Image

    from ..model.processor import PerceptionDLMProcessor

IMAGE = "<image>"
_NEXT = "\n<|start_header_id|>user<|end_header_id|>\n"
_VERSION = 1
_ROW = np.dtype(
    [
        *(("record", "u8"), ("record_bytes", "u4"), ("photo", "u8"), ("photo_bytes", "u4")),
        *(("prefix", "u4"), ("answer", "u4")),
    ]
)
"""`photo_bytes` is 0 if the photo is a file or missing."""

_AT_ONCE = 1024
_PROBES = 16
_FROM = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


class Turn(msgspec.Struct):
    """What one speaker says in one turn."""

    speaker: str = msgspec.field(name="from")
    value: str = ""


class Record(msgspec.Struct):
    """One conversation. `image` is the photo's path, or None if the photo is embedded."""

    conversations: list[Turn]
    id: str | int | None = None
    image: str | None = None


class Given(NamedTuple):
    """A record as its file has it.

    Attributes:
        record: the conversation.
        photo: the bytes of its photo if they are embedded, else empty.
        name: of the photo's file; "" if it is not known.
    """

    record: Record
    photo: bytes
    name: str


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
    """The conversations of one file. Each conversation is an item."""

    def __init__(self, table: Table, source: ConversationSource):
        self.table, self.source = table, source

    @property
    def num_items(self) -> int:
        """Number of conversations."""
        return len(self.table.rows)

    @property
    def fingerprint(self) -> str:
        """Identifies the items: it changes when they do."""
        return self.table.about["digest"]

    @property
    def left_out(self) -> dict[str, int]:
        """Number of conversations that are not trained on because of their photo, by reason."""
        return self.table.about.get("left_out", {})

    def lengths(self, items: np.ndarray, passes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of items before and from the first answer on: (N,) int64 each, the same in all passes."""
        rows = self.table.rows[items]
        return rows["prefix"].astype(np.int64), rows["answer"].astype(np.int64)

    def read_record(self, item: int, max_pixels: int) -> tuple[Record, Image.Image, str]:
        """An item's record, its photo, and its name for messages.

        Args:
            item: index of the item.
            max_pixels: most pixels of a photo.

        Raises:
            BadSample: the record names no photo, or the photo is missing or broken.
        """
        row = self.table.rows[item]
        data = self.table.bytes_at(int(row["record"]), int(row["record_bytes"]))
        record = msgspec.json.decode(data, type=Record)
        name = f"{self.source.path}: {item if record.id is None else record.id}"
        if not row["photo_bytes"] and not record.image:
            raise BadSample(
                "conversation_without_image",
                f"{name}: conversations without an image cannot be trained on; leave it out",
            )
        try:
            if row["photo_bytes"]:
                photo, blob = self.table.bytes_at(int(row["photo"]), int(row["photo_bytes"])), Blob(name)
            else:
                blob = Blob(_path(self.source, record))
                photo = files.read(blob)
            return record, photos.decode_image(blob, photo, max_pixels), name
        except OSError as error:
            detail = f"{name}: {blob}: {error.strerror or error}; put it there or correct `images`"
            raise BadSample("photo_missing", detail) from error
        except BadRecord as error:
            raise BadSample(str(error.reason), f"{name}: {error.detail}") from error


def open_conversations(
    source: ConversationSource, processor: PerceptionDLMProcessor, cache: Path, keep_benchmarks: bool = False
) -> Conversations:
    """Open a file of conversations through its table in the cache, which is written if it is missing.

    Args:
        source: the file, and the folder of its photos.
        processor: the model's processor.
        cache: local folder of the tables.
        keep_benchmarks: train on the photos of benchmarks too.

    Raises:
        ConfigError: the file is missing, or its form is unknown.
    """
    try:
        version = files.version(source.path)
    except OSError as error:
        raise ConfigError(
            f"{source.path}: {error.strerror or error}; give a file of conversations"
        ) from error
    config = processor.config
    facts = (_VERSION, source.path, source.images, version, tokenizer_digest(processor))
    facts += (config.tile_px, config.tokens_per_tile, config.max_tiles)
    facts += () if keep_benchmarks else (left_out.BENCHMARK_PHOTOS, left_out.list_digest())
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def write(folder: Path) -> None:
        _write(folder, source, processor, keep_benchmarks)

    folder = cached_folder(cache, f"conversations-{name}", write)
    return Conversations(Table(folder, _ROW), source)


def tokenize_conversation(
    record: Record,
    views: int,
    processor: PerceptionDLMProcessor,
    encode: Callable[[str], list[int]],
    name: str,
) -> ConversationTokens:
    """A conversation as tokens. All answers are labeled, and so is the end token after each.

    Args:
        record: human and gpt take turns in it.
        views: number of views of the photo.
        processor: the model's processor.
        encode: turns a text into tokens, none of them special.
        name: the record's name for messages.

    Raises:
        BadSample: the turns are out of order, or the image is not exactly once in the first turn.
    """
    turns = record.conversations
    speakers = [_FROM.get(turn.speaker) for turn in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise BadSample(
            "conversation_unusable", f"{name}: human and gpt have to take turns; correct the record"
        )
    counts = [turn.value.count(IMAGE) for turn in turns]
    if sum(counts) > 1 or sum(counts) != counts[0]:
        detail = f"{name}: {IMAGE} may be given once, in the first turn; correct the record"
        raise BadSample("conversation_unusable", detail)
    config = processor.config
    tokenize = processor.tokenize
    shown = [*tokenize("<img>"), *[config.image_token_id] * (views * config.tokens_per_tile)]
    shown += tokenize("</img>")
    before, _, after = turns[0].value.partition(IMAGE) if counts[0] else ("", "", turns[0].value)
    tokens = ConversationTokens(
        [*tokenize(HEAD), *encode(before), *shown, *encode(after), *tokenize(ANSWER)], [], []
    )
    for number in range(1, len(turns), 2):
        if number > 1:
            asked = [*tokenize(_NEXT), *encode(turns[number - 1].value), *tokenize(ANSWER)]
            tokens.answer.extend(asked)
            tokens.labels.extend([False] * len(asked))
        answer = [*encode(turns[number].value), config.eot_token_id]
        tokens.answer.extend(answer)
        tokens.labels.extend([True] * len(answer))
    return tokens


def make_conversation_example(
    record: Record, photo: Image.Image, processor: PerceptionDLMProcessor, name: str
) -> tuple[Example, np.ndarray]:
    """The training example of a conversation, which has no regions.

    Returns:
        The example, and (L,) bool, which of the tokens of its answers are labeled.

    Raises:
        BadSample: the record is not usable, as in `tokenize_conversation`.
    """
    config = processor.config
    grid = tiling.tile_grid(*photo.size, config.tile_px, config.max_tiles)
    views = tiling.num_views(grid)
    tokens = tokenize_conversation(
        record, views, processor, lambda text: token_lists(processor, [text])[0], name
    )
    example = Example(
        views=tiling.cut_image(photo, config.tile_px, grid),
        prompts=np.zeros((views, config.num_prompts, config.patches_per_side**2), bool),
        grid=grid,
        boxes=[],
        order=[],
        prefix=_shared(tokens.prefix, 0),
        captions=_shared(tokens.answer, len(tokens.prefix)),
    )
    return example, np.array(tokens.labels)


def _shared(ids: list[int], start: int) -> np.ndarray:
    return np.array([ids, range(start, start + len(ids)), [SHARED] * len(ids)], np.int64)


def _path(source: ConversationSource, record: Record) -> str:
    name = record.image or ""
    if name.startswith("/") or "://" in name or ".." in name.split("/"):
        raise BadSample(
            "unsafe_name", f"{source.path}: {record.id}: {name}: leads out of `images`; correct the record"
        )
    return f"{source.images.rstrip('/')}/{name}" if source.images else name


def _write(
    folder: Path, source: ConversationSource, processor: PerceptionDLMProcessor, keep_benchmarks: bool
) -> None:
    writer, digest, omitted = TableWriter(folder), hashlib.sha256(), 0
    records = _records(source)
    most = tiling.num_views((processor.config.max_tiles, 1))
    with ThreadPoolExecutor(_PROBES) as pool:
        while some := list(itertools.islice(records, _AT_ONCE)):
            sizes = list(pool.map(lambda each: _size(source, each.record, each.photo), some))
            if not keep_benchmarks:
                stays = [not _of_benchmark(*pair) for pair in zip(some, sizes, strict=True)]
                omitted += stays.count(False)
                some, sizes = list(itertools.compress(some, stays)), list(itertools.compress(sizes, stays))
            known = np.array([size for size in sizes if size], np.int64).reshape(-1, 2)
            views = iter(views_of(known, processor).tolist() if len(known) else [])
            counts = [next(views) if size else most for size in sizes]
            rows = _rows(some, counts, processor, writer)
            digest.update(rows.tobytes() + b"".join(msgspec.json.encode(each.record) for each in some))
            writer.add(rows)
    counted = {left_out.BENCHMARK_PHOTOS: omitted} if omitted else {}
    if not writer.num_rows and omitted:
        raise ConfigError(f"{source.path}: nothing is left to train on: {left_out.said(counted)}")
    if not writer.num_rows:
        raise ConfigError(f"{source.path}: the file has no conversation; name another one")
    writer.close({"digest": digest.hexdigest()} | ({"left_out": counted} if counted else {}))


def _of_benchmark(given: Given, size: tuple[int, int] | None) -> bool:
    """Whether a conversation is about a photo of a benchmark, by the name of its file and by its id."""
    has_photo = bool(given.photo or given.record.image)
    return has_photo and left_out.is_benchmark(given.name, size or (None, None), given.record.id)


def _rows(
    records: list[Given],
    views: list[int],
    processor: PerceptionDLMProcessor,
    writer: TableWriter,
) -> np.ndarray:
    texts = [
        part for each in records for turn in each.record.conversations for part in turn.value.split(IMAGE)
    ]
    texts = list({text: None for text in [*texts, ""]})
    tokens = dict(zip(texts, token_lists(processor, texts), strict=True))
    rows = np.zeros(len(records), _ROW)
    for row, (record, photo, _), count in zip(rows, records, views, strict=True):
        try:
            made = tokenize_conversation(record, count, processor, tokens.__getitem__, "")
            row["prefix"], row["answer"] = len(made.prefix), len(made.answer)
        except BadSample:
            row["prefix"] = 1  # the error is raised, with the record's name, when the item is read
        data = msgspec.json.encode(record)
        row["record"], row["record_bytes"] = writer.put(data), len(data)
        row["photo"], row["photo_bytes"] = writer.put(photo), len(photo)
    return rows


def _size(source: ConversationSource, record: Record, photo: bytes) -> tuple[int, int] | None:
    """Width and height of a record's photo; None if it cannot be read."""
    from PIL import Image

    try:
        if photo:
            with photos.quiet(), Image.open(io.BytesIO(unturned(photo)), formats=photos.FORMATS) as opened:
                return opened.size
        header = photos.probe(Blob(_path(source, record)), 1 << 40)
        return header.width, header.height
    except (BadRecord, BadSample, *photos.BROKEN):
        return None


def _records(source: ConversationSource) -> Iterator[Given]:
    """Every record in order."""
    read = {".json": _from_json, ".jsonl": _from_lines, ".parquet": _from_parquet}
    ending = Path(source.path).suffix.lower()
    if ending not in read:
        raise ConfigError(f"{source.path}: conversations have to be a .json, .jsonl or .parquet file")
    number = 0
    try:
        for number, each in enumerate(read[ending](source.path), start=1):  # noqa: B007 - for the message
            yield each
    except (OSError, msgspec.MsgspecError, UnicodeError, ValueError, KeyError) as error:
        raise ConfigError(f"{source.path}: after record {number}: {error}; correct the file there") from error


def _from_json(path: str) -> Iterator[Given]:
    for raw in msgspec.json.decode(files.read(Blob(path)), type=list[msgspec.Raw]):
        yield _beside(msgspec.json.decode(raw, type=Record))


def _from_lines(path: str) -> Iterator[Given]:
    with files.open_url(path, 8 << 20) as file:
        for line in file:
            if line.strip():
                yield _beside(msgspec.json.decode(line, type=Record))


def _from_parquet(path: str) -> Iterator[Given]:
    table = TableFile(path)
    columns = [name for name in ("id", "image", "conversations") if name in table.names]
    for group in table.row_groups(columns):
        for batch in group.to_batches(64):
            for row in batch.to_pylist():
                yield _from_row(row)


def _from_row(row: dict[str, Any]) -> Given:
    image, turns = row.pop("image", None), row["conversations"]
    if isinstance(turns, str):
        row["conversations"] = msgspec.json.decode(turns)
    photo = image.get("bytes") if isinstance(image, dict) else image if isinstance(image, bytes) else None
    path = image.get("path") if isinstance(image, dict) else image if isinstance(image, str) else None
    record = msgspec.convert({**row, "image": None if photo else path}, Record)
    return Given(record, photo or b"", path or "")


def _beside(record: Record) -> Given:
    """A record whose photo is a file of its own."""
    return Given(record, b"", record.image or "")
