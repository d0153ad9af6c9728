"""Files in the forms of the released code's training data, and what the loader makes of them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pycocotools import mask as coco_mask

from paracaption.model_training.data.loader import Loader
from paracaption.schemas.training import ConversationSource
from tests.model_training.corpora import loader, processor

ASKED = [("human", "<image>\nwhat?"), ("gpt", "a cat")]


def turns(*said: tuple[str, Any], form: str = "from") -> list[dict[str, Any]]:
    speaker, text = ("from", "value") if form == "from" else ("role", "content")
    return [{speaker: who, text: what} for who, what in said]


def photo(width: int = 40, height: int = 70, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(out, kind)
    return out.getvalue()


def write_photos(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(photo())
    return folder


def write_json(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def opened(path: Path | str, images: Path | str = "", **options: Any) -> Loader:
    cache = Path(path).parent / f"cache-{len(list(Path(path).parent.glob('cache-*')))}"
    source = ConversationSource(path=str(path), images=str(images))
    given = {"packed": False, "max_examples": 1, "cache": str(cache)} | options
    return loader(Path(path).parent / "out", sources=[source], **given)


def texts(found: Loader) -> dict[str, str]:
    """What each item reads as, with one `#` for the tokens of a view."""
    made, read = processor(), {}
    view = "<IMG_CONTEXT>" * made.config.tokens_per_tile
    for batch in found:
        read[batch.keys[0].rpartition(": ")[2]] = made.tokenizer.decode(batch.tokens.ids_BL[0]).replace(
            view, "#"
        )
    return read


def said_in(text: str) -> list[str]:
    """The questions and answers of an item's text."""
    return [part.partition("<|eot_id|>")[0] for part in text.split("<|end_header_id|>\n")[2:]]


def only(path: Path, images: Path | str = "") -> list[str]:
    """The questions and answers of the only item of a file."""
    (text,) = texts(opened(path, images)).values()
    return said_in(text)


def drawn_masks(count: int, width: int, height: int) -> list[np.ndarray]:
    draw = np.random.default_rng(count)
    return [(draw.random((height, width)) < 0.2 + number / 20) for number in range(count)]


def rles(masks: list[np.ndarray]) -> list[dict[str, Any]]:
    """As pycocotools makes them."""
    found: list[Any] = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    return [{"size": each["size"], "counts": each["counts"].decode()} for each in found]


def decoded(coded: Any) -> np.ndarray:
    """A mask as pycocotools reads it: (H, W) bool."""
    return coco_mask.decode(coded).astype(bool)
