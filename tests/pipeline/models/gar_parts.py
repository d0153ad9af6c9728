"""What the tests of GAR share: photos with regions, and the encoder's parts without an engine."""

from pathlib import Path

import numpy as np
from PIL import Image

from paracaption.filters import rle
from paracaption.schemas.records import Blob, ImageRecord, Region

TILE_PX = 112
"""Small tiles make short prompts: 16 tokens each instead of 256."""


def photo(folder: Path, key: str, size=(224, 448), seed=0) -> ImageRecord:
    """A photo of coloured noise in a file, as yet without regions; `size` is (height, width)."""
    blocks = np.random.default_rng(seed).integers(0, 255, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    path = folder / f"{key}.png"
    Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(path)
    return ImageRecord(key=key, subset="sa1b", photo=Blob(str(path)), width=size[1], height=size[0])


def with_boxes(image: ImageRecord, *boxes: tuple[int, int, int, int]) -> ImageRecord:
    """The image with a region for each (x, y, width, height); a width of 0 is an empty mask."""
    regions = []
    for number, (x, y, width, height) in enumerate(boxes):
        mask = np.zeros((image.height, image.width), bool)
        mask[y : y + height, x : x + width] = True
        found = rle.from_mask(mask)
        regions.append(Region(id=number, rle=found.rle, bbox=found.bbox, area=found.area))
    return ImageRecord(image.key, image.subset, image.photo, image.width, image.height, regions=regions)


def load_parts(model: Path):
    """Config, tokenizer, vision side and embedding of a checkpoint."""
    import torch

    from paracaption.pipeline.models.gar import checkpoint
    from paracaption.pipeline.models.gar.prompt import Prompts
    from paracaption.pipeline.models.gar.vision import load_vision

    config = checkpoint.read_config(model)
    checkpoint.check_tensors(config)
    embed = checkpoint.tensor(config, f"{checkpoint.LANGUAGE}embed_tokens.weight", torch.float32, "cpu")
    return config, Prompts(config), load_vision(config, torch.float32, "cpu"), embed
