"""A layout is named options; each one changes what it says and nothing else."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from paracaption.model_training.model.attention import dense_mask
from paracaption.model_training.model.batch import Images, collate
from paracaption.model_training.model.layout import (
    CORRECTED,
    LAYOUTS,
    REFERENCE,
    Layout,
    resolve_layout,
)
from paracaption.schemas.errors import ConfigError
from tests.model_training.tiny_models import lively, photo

SAME_LENGTH = Layout().instruction.replace("detail", "colour")

CHANGES: list[tuple[str, Any, set[str]]] = [
    ("mask_resample", "bicubic", {"prompts"}),
    ("min_patch_share", 0.9, {"prompts"}),
    ("replay_map", "shifted", {"replay"}),
    ("replay_scale", 0.5, {"replay"}),
    ("inclusive_boxes", True, {"boxes", "replay"}),
    ("hidden_newlines", True, {"prefix codes", "attention"}),
    ("isolate_prefix", False, {"attention"}),
    ("restart_positions", True, {"caption positions"}),
    ("block_end", "newline", {"caption ids"}),
    ("cut", "answer", {"text"}),
    ("instruction", SAME_LENGTH, {"prefix ids"}),
]


def everything(**options):
    """All that a layout has a say in, by name, for one photo with three regions."""
    model, processor = lively(layout_options=options)
    pixels, masks = photo(1, 3)
    example = processor.make_example(pixels, masks, [[65, 66], [67], [68, 69, 70]])
    batch = collate([example])
    roles = batch.tokens().roles
    features = torch.randn(
        len(example.views), 4, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    eot = model.config.eot_token_id
    filled = np.array([[65, eot, 65], [66, 66, 66], [67, 67, eot]])
    attention = dense_mask(roles, roles, model.layout.isolate_prefix)
    assert torch.equal(attention, model.attention_mask(roles, roles).mask[:, 0])
    return {
        "views": example.views,
        "prompts": example.prompts,
        "boxes": np.array(example.boxes),
        "order": np.array(example.order),
        "prefix ids": example.prefix[0],
        "prefix positions": example.prefix[1],
        "prefix codes": example.prefix[2],
        "caption ids": example.captions[0],
        "caption positions": example.captions[1],
        "caption codes": example.captions[2],
        "replay": model.replay_regions(features, batch.images).detach().numpy(),
        "attention": attention.numpy(),
        "text": processor.read_captions(filled, example.order),
    }


def changed(before, after):
    return {name for name in before if not np.array_equal(before[name], after[name])}


def test_every_option_is_tried_below():
    assert {option for option, _, _ in CHANGES} == {field.name for field in dataclasses.fields(Layout)}


@pytest.mark.parametrize(("option", "value", "parts"), CHANGES, ids=[option for option, _, _ in CHANGES])
def test_an_option_changes_what_it_says_and_nothing_else(option, value, parts):
    assert changed(everything(), everything(**{option: value})) == parts


def test_names_stand_for_layouts_and_options_for_differences():
    assert resolve_layout("corrected") == CORRECTED == Layout()
    assert resolve_layout("reference", {}) == REFERENCE
    found = resolve_layout("reference", {"replay_scale": 1, "cut": "block"})
    assert found == dataclasses.replace(REFERENCE, replay_scale=1, cut="block")
    assert REFERENCE.replay_scale == 1 / 32, "the named layouts do not change"
    for name in LAYOUTS:
        for field in dataclasses.fields(Layout):  # each layout's own values are values that options take
            value = getattr(LAYOUTS[name], field.name)
            assert getattr(resolve_layout("corrected", {field.name: value}), field.name) == value


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("original", None, "unknown layout 'original'; choose one of corrected, reference"),
        ("corrected", {"replay": "tiles"}, "unknown option 'replay'; the options are mask_resample"),
        ("corrected", {"replay_map": "thumbnail"}, "replay_map: 'thumbnail'; give 'tiles' or 'shifted'"),
        ("corrected", {"mask_resample": None}, "mask_resample: None"),
        ("corrected", {"block_end": ["eot"]}, "block_end"),
        ("corrected", {"isolate_prefix": "no"}, "isolate_prefix: 'no'; give bool"),
        ("corrected", {"isolate_prefix": 1}, "isolate_prefix: 1; give bool"),
        ("corrected", {"replay_scale": "1/32"}, "replay_scale: '1/32'; give float"),
        ("corrected", {"replay_scale": True}, "replay_scale: True; give float"),
        ("corrected", {"instruction": None}, "instruction: None; give str"),
    ],
)
def test_an_unknown_layout_option_or_value_is_an_error_that_names_what_there_is(name, options, message):
    with pytest.raises(ConfigError) as error:
        resolve_layout(name, options)
    assert message in str(error.value)


@pytest.mark.parametrize("changes", [{"layout": "none"}, {"layout_options": {"cut": "word"}}])
def test_a_config_with_an_unsound_layout_cannot_be_made(changes):
    from paracaption.model_training.model.config import PerceptionDLMConfig

    with pytest.raises(ConfigError, match="layout"):
        PerceptionDLMConfig(**changes)


SIDE = 2
"""Tokens of a tile are two by two."""


def replay_of_places(layout, grid, boxes, **options):
    """Replay (regions, places, x and y) of a map whose tokens say where they are; the thumbnail's say 9."""
    model, _ = lively(layout=layout, layout_options=options)
    across, down = grid
    width, height = across * SIDE, down * SIDE
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    places = torch.stack([x / width, y / height], dim=-1).double()
    tiles = places.unflatten(0, (down, SIDE)).unflatten(2, (across, SIDE)).transpose(1, 2).flatten(0, 1)
    views = torch.cat([tiles.flatten(1, 2), torch.full((1, SIDE * SIDE, 2), 9.0, dtype=torch.float64)])
    images = Images(
        views_N3SS=torch.empty(0),
        prompts_NPQ=torch.empty(0),
        grids_I2=torch.tensor([grid]),
        boxes_R4=torch.tensor(boxes),
        image_R=torch.zeros(len(boxes), dtype=torch.int64),
    )
    return model.replay_regions(views, images)


BOXES = [(0.5, 0.5, 0.75, 1.0), (0.4, 0.2, 0.9, 0.7), (0.25, 0.3, 0.65, 0.45), (0.3, 0.6, 0.5, 0.61)]


@pytest.mark.parametrize("grid", [(3, 2), (2, 3), (6, 1), (1, 6), (2, 2)])
def test_the_corrected_layout_replays_a_region_from_inside_its_box(grid):
    found = replay_of_places("corrected", grid, BOXES)
    edge = torch.tensor(
        [0.5 / (grid[0] * SIDE), 0.5 / (grid[1] * SIDE)]
    )  # beyond the middle of the last token, the map is flat
    for (x1, y1, x2, y2), places in zip(BOXES, found, strict=True):
        centres = [
            (x1 + (i + 0.5) / 2 * (x2 - x1), y1 + (j + 0.5) / 2 * (y2 - y1))
            for j in range(2)
            for i in range(2)
        ]
        expected = torch.tensor(centres).clamp(min=edge, max=1 - edge)
        assert (places - expected).abs().max() < 0.5 * float(edge.max()), (x1, y1)
        inside = (places >= torch.tensor([x1, y1]) - 1e-6) & (places <= torch.tensor([x2, y2]) + 1e-6)
        reachable = (expected > edge) & (expected < 1 - edge)
        assert inside[reachable].all()


def test_the_reference_layout_replays_every_region_from_the_upper_left_corner():
    found = replay_of_places("reference", (3, 2), BOXES)
    first_right_of_it = 2 * SIDE / (3 * SIDE)  # the shifted map's first tile is the image's second
    assert (found[..., 0] <= first_right_of_it).all()
    assert (found[..., 0] >= 1 / 3).all()
    assert (found[..., 1] <= 1 / (2 * SIDE) + 0.01).all()


def test_the_thumbnail_is_part_of_the_shifted_map_alone():
    whole = [(0.0, 0.0, 1.0, 1.0), (0.8, 0.8, 1.0, 1.0)]
    assert replay_of_places("corrected", (3, 2), whole).max() < 1
    assert (replay_of_places("corrected", (3, 2), whole, replay_map="shifted")[1] > 1).all()
