"""Models with random weights and batches of random images, made without a tokenizer or a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model_training.attention import HIDDEN, SHARED
from model_training.batch import PADDING, Batch
from model_training.config import PerceptionDLMConfig
from model_training.model import PerceptionDLM

MASK, EOT, IMAGE, RESERVED, CAPTION, NEWLINE, TEXT = range(7)
"""Token ids; words begin at TEXT."""


def config(**changes: Any) -> PerceptionDLMConfig:
    """Tiny sizes."""
    vision = {
        "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    text = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip
    given = {"vision_config": vision, "text_config": text, "mask_token_id": MASK, "eot_token_id": EOT}
    return PerceptionDLMConfig(**(given | changes))


def model(seed: int = 0, **changes: Any) -> PerceptionDLM:
    """Random weights, large enough that every input matters and logits lie apart."""
    return fill(PerceptionDLM(config(**changes)).eval(), seed)


@torch.no_grad()
def fill(model: PerceptionDLM, seed: int = 0) -> PerceptionDLM:
    """Matrices of variance 1 / inputs, embeddings of variance 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() >= 2:
            scale = 1.0 if "embed_tokens" in name or "prompt" in name else weight[0].numel() ** -0.5
            weight.normal_(0, scale, generator=generator)
    model.lm_head.weight *= 3
    return model


def batch(
    config: PerceptionDLMConfig,
    images: Sequence[tuple[tuple[int, int], int, int]],
    length: int = 4,
    prompt: int = 5,
) -> Batch:
    """Images of (grid, regions, seed), a row per group of regions, padded.

    What an image holds follows from its seed alone, so that it is the same in every batch.
    """
    rows = [
        _row(config, image, mask, grid, seed, length, prompt)
        for image, (grid, regions, seed) in enumerate(images)
        for mask in _groups(regions, config.num_prompts)
    ]
    return joined(rows)


def _groups(regions: int, most: int) -> list[range]:
    return [range(i, min(i + most, regions)) for i in range(0, regions, most)]


def _row(
    config: PerceptionDLMConfig,
    image: int,
    masks: range,
    grid: tuple[int, int],
    seed: int,
    length: int,
    prompt: int,
) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    tiles = grid[0] * grid[1] + (grid != (1, 1))
    side, patches, n = config.tile_px, config.grid**2, len(masks)
    pixels = torch.randint(0, 256, (tiles, 3, side, side), generator=draw, dtype=torch.uint8)
    of_all = torch.rand(64, tiles, patches, generator=draw)
    corners = torch.rand(64, 2, 2, generator=draw).sort(1).values
    words = torch.randint(TEXT, config.text_config.vocab_size, (prompt,), generator=draw)
    marks = torch.zeros(tiles, patches, config.num_prompts, dtype=torch.uint8)
    marks[..., :n] = (of_all[masks.start : masks.stop] < 0.2).permute(1, 2, 0)
    hidden = HIDDEN if config.replay_newlines == "hidden" else SHARED
    ids, regions, slots, slot_regions = [*words.tolist()], [SHARED] * prompt, [], []
    image_at = list(range(prompt, prompt + tiles * config.tokens_per_tile))
    ids += [IMAGE] * len(image_at)
    regions += [SHARED] * len(image_at)
    replay_at = []
    for i in range(n):
        replay_at += range(len(ids), len(ids) + config.replay_tokens)
        ids += [RESERVED] * config.replay_tokens + [NEWLINE]
        regions += [-(i + 1)] * config.replay_tokens + [hidden if i + 1 < n else SHARED]
    ids += words.flip(0).tolist()
    regions += [SHARED] * prompt
    for i in range(n):
        slots += range(len(ids) + 1, len(ids) + 1 + length)
        slot_regions += [i] * length
        last = EOT if config.caption_end == "each" or i + 1 == n else NEWLINE
        ids += [CAPTION] + [MASK] * length + [last]
        regions += [i + 1] * (length + 2)
    return Batch(
        pixels_TCSS=pixels,
        prompts_TPK=marks,
        grids=(grid,),
        regions=(n,),
        boxes_N4=corners[masks.start : masks.stop].flatten(1)[:, [0, 2, 1, 3]],
        input_ids_BL=torch.tensor(ids)[None],
        region_ids_BL=torch.tensor(regions)[None],
        documents_BL=torch.zeros(1, len(ids), dtype=torch.long),
        positions_BL=torch.arange(len(ids))[None],
        image_at_I=torch.tensor(image_at),
        replay_at_R=torch.tensor(replay_at),
        slots_BS=torch.tensor(slots)[None],
        slot_regions_BS=torch.tensor(slot_regions)[None],
        origins=tuple((image, mask) for mask in masks),
    )


def joined(rows: Sequence[Batch]) -> Batch:
    """Batches of one row as one batch, padded on the right."""
    positions = max(row.input_ids_BL.shape[1] for row in rows)
    slots = max(row.slots_BS.shape[1] for row in rows)

    def padded(name: str, width: int, value: int) -> Tensor:
        parts = [getattr(row, name) for row in rows]
        return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value) for x in parts])

    answers = torch.tensor([0, *(len(row.origins) for row in rows)]).cumsum(0)
    slot_regions = padded("slot_regions_BS", slots, PADDING)
    slot_regions = torch.where(slot_regions >= 0, slot_regions + answers[:-1, None], PADDING)
    return Batch(
        pixels_TCSS=torch.cat([row.pixels_TCSS for row in rows]),
        prompts_TPK=torch.cat([row.prompts_TPK for row in rows]),
        grids=tuple(row.grids[0] for row in rows),
        regions=tuple(row.regions[0] for row in rows),
        boxes_N4=torch.cat([row.boxes_N4 for row in rows]),
        input_ids_BL=padded("input_ids_BL", positions, 0),
        region_ids_BL=padded("region_ids_BL", positions, SHARED),
        documents_BL=padded("documents_BL", positions, PADDING),
        positions_BL=padded("positions_BL", positions, 0),
        image_at_I=torch.cat([row.image_at_I + positions * i for i, row in enumerate(rows)]),
        replay_at_R=torch.cat([row.replay_at_R + positions * i for i, row in enumerate(rows)]),
        slots_BS=padded("slots_BS", slots, PADDING),
        slot_regions_BS=slot_regions,
        origins=tuple(origin for row in rows for origin in row.origins),
    )
