"""GAR's prompts: every photo read once, only touched tiles encoded anew, and nothing else changes by it."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paracaption.pipeline.io.prefetch import ahead
from paracaption.pipeline.models.gar.image import box_of, cut_mask, cut_photo, tile_grid
from paracaption.schemas.errors import BadRecord, OutOfMemory, StageFailed
from paracaption.schemas.records import Blob
from tests.pipeline.models.gar_parts import TILE_PX, load_parts, photo, with_boxes
from tests.tiny.gar import write_gar

BOXES = [(5, 5, 60, 60), (400, 200, 40, 20), (0, 0, 448, 224), (100, 90, 40, 40), (330, 20, 3, 3)]


@pytest.fixture(scope="module", params=["1b", "8b"])
def parts(request, tmp_path_factory):
    return load_parts(
        write_gar(tmp_path_factory.mktemp("gar") / "m", request.param, tile_px=TILE_PX, max_tiles=8)
    )


def encoder_of(parts, **options):
    from paracaption.pipeline.models.gar.encoder import Encoder

    return Encoder(*parts, **options)


def encode(encoder, *images):
    return dict(encoder.run(encoder.prepare(images)))


def whole(parts, image, region):
    """The prompt of one region as the original makes it: every tile is encoded with its mask."""
    import torch

    from paracaption.filters import rle
    from paracaption.pipeline.io.photos import read_pixels
    from paracaption.pipeline.models.gar.roi_align import replay

    config, prompts, vision, embed = parts
    grid = tile_grid(image.width, image.height, config.tile_px, config.max_tiles)
    mask = rle.decode(region.rle)
    features = vision(
        cut_photo(read_pixels(image), config.tile_px, grid), cut_mask(mask, config.tile_px, grid)
    )
    layout = prompts.write(len(features))
    prompt = embed[torch.tensor(layout.ids)]
    prompt[slice(*layout.image)] = features.flatten(0, 1)
    prompt[slice(*layout.crop)] = replay([features[1:]], grid, [box_of(mask)], config.side)[0]
    return prompt


def close(one, other):
    np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=0, atol=1e-5)


def test_a_tile_without_mask_has_the_unmasked_features_to_the_last_bit(parts, tmp_path):
    import torch

    from paracaption.pipeline.io.photos import read_pixels

    config, _, vision, _ = parts
    image = photo(tmp_path, "a")
    tiles = cut_photo(read_pixels(image), config.tile_px, (4, 2))
    mask = np.zeros((224, 448), bool)
    mask[20:50, 130:200] = True  # the second tile of the first row
    masks = cut_mask(mask, config.tile_px, (4, 2))
    assert masks.flatten(1).any(1).tolist() == [True, False, True, *[False] * 6]
    plain, masked = vision(tiles), vision(tiles, masks)
    for tile, touched in enumerate(masks.flatten(1).any(1).tolist()):
        assert torch.equal(plain[tile], masked[tile]) != touched, tile


def test_prompts_of_many_regions_are_those_of_one_at_a_time(parts, tmp_path):
    images = [
        with_boxes(photo(tmp_path, "a"), *BOXES),
        with_boxes(photo(tmp_path, "b", (448, 112), 1), *BOXES[:1]),
    ]
    found = encode(encoder_of(parts), *images)
    assert list(found) == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0)], "in order"
    for (number, place), prompt in found.items():
        close(prompt, whole(parts, images[number], images[number].regions[place]))


@pytest.mark.parametrize("tiles_per_batch", [1, 3, 100])
def test_the_size_of_batches_changes_nothing(parts, tmp_path, tiles_per_batch):
    image = with_boxes(photo(tmp_path, "a"), *BOXES)
    sizes = []
    encoder = encoder_of(parts, tiles_per_batch=tiles_per_batch)
    hook = encoder.vision.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    found = encode(encoder, image)
    hook.remove()
    assert max(sizes) <= tiles_per_batch
    for key, prompt in encode(encoder_of(parts), image).items():
        close(found[key], prompt)


def test_only_touched_tiles_are_encoded_again_and_photos_are_cut_once(parts, tmp_path, monkeypatch):
    from paracaption.pipeline.models.gar import encoder as module

    counts = {"read": 0, "cut": 0}

    def counted(name, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(module, "read_pixels", counted("read", module.read_pixels))
    monkeypatch.setattr(module.cutting, "cut_photo", counted("cut", module.cutting.cut_photo))
    encoder = encoder_of(parts)
    assert len(encode(encoder, with_boxes(photo(tmp_path, "a"), BOXES[0], BOXES[1], BOXES[0]))) == 3
    # Of 8 tiles and the thumbnail, each region touches one and the thumbnail. The first needs the 7 others
    # without a mask; the second also the one that the first touches; the third nothing new.
    assert tuple(encoder.counts) == (3, (2 + 7) + (2 + 1) + 2, 3 * 9)
    assert counts == {"read": 1, "cut": 1}


def test_photos_without_regions_to_caption_are_not_even_read(parts, tmp_path):
    image = photo(tmp_path, "a")
    image.photo = Blob(str(tmp_path / "not there.png"))
    encoder = encoder_of(parts)
    assert encode(encoder, image) == {}
    assert encode(encoder, with_boxes(image, (0, 0, 0, 0))) == {}, "an empty mask"
    with pytest.raises(BadRecord, match=r"not there\.png"):
        encode(encoder, with_boxes(image, BOXES[0]))


def test_a_mask_that_resizing_skips_still_has_a_prompt(parts, tmp_path):
    image = with_boxes(photo(tmp_path, "a", (896, 1792)), (1, 1, 1, 1))  # shrunk: every second pixel
    config = parts[0]
    mask = np.zeros((896, 1792), bool)
    mask[1, 1] = True
    assert not cut_mask(mask, config.tile_px, (4, 2)).any()
    [prompt] = encode(encoder_of(parts), image).values()
    close(prompt, whole(parts, image, image.regions[0]))


def test_memory_that_runs_out_halves_the_batch_and_changes_nothing(parts, tmp_path):
    import torch

    image = with_boxes(photo(tmp_path, "a"), *BOXES)
    expected = encode(encoder_of(parts), image)
    encoder = encoder_of(parts)
    limit = [3]

    def at_most(_, given):
        if len(given[0]) > limit[0]:
            raise torch.OutOfMemoryError("too many tiles")

    hook = encoder.vision.register_forward_pre_hook(at_most)
    try:
        for key, prompt in encode(encoder, image).items():
            close(prompt, expected[key])
        assert encoder.batches.size <= 3
        limit[0] = 0
        with pytest.raises(OutOfMemory, match="tiles in the vision tower: out of memory with a batch of one"):
            encode(encoder, image)
    finally:
        hook.remove()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_an_error_and_no_prompt(parts, tmp_path, value):
    encoder = encoder_of(parts)

    def spoil(module, given, features):
        features = features.clone()
        features[-1, -1, -1] = value
        return features

    hook = encoder.vision.register_forward_hook(spoil)
    try:
        with pytest.raises(StageFailed, match=r"features of a region are NaN or infinite, in torch\.float32"):
            encode(encoder, with_boxes(photo(tmp_path, "a"), BOXES[0]))
    finally:
        hook.remove()


def test_works_are_drawn_a_batch_at_a_time(parts, tmp_path):
    image = with_boxes(photo(tmp_path, "a"), *BOXES[:1])
    drawn = []

    def endless():
        encoder = encoder_of(parts)
        while True:
            for work in encoder.prepare([image]):
                drawn.append(len(work.tiles))
                yield work

    prompts = encoder_of(parts, tiles_per_batch=18).run(endless())
    for _ in range(6):
        next(prompts)
    assert sum(drawn) <= 6 * 9 + 18 + 7, "what was used, a batch, and the work that did not fit"


# Cutting.


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 16))
def test_a_grid_holds_at_most_so_many_tiles_and_lies_as_the_photo_does(width, height, most):
    across, down = tile_grid(width, height, 448, most)
    assert 1 <= across * down <= most
    if most >= 4 and width >= 2 * height:
        assert across > down
    if most >= 4 and height >= 2 * width:
        assert down > across


@pytest.mark.parametrize(
    ("size", "most_16", "most_8"),
    [
        ((448, 448), (4, 4), (2, 2)),
        ((640, 480), (4, 3), (3, 2)),
        ((640, 427), (5, 3), (3, 2)),
        ((1024, 770), (4, 4), (3, 2)),
        ((1920, 1080), (5, 3), (3, 2)),
        ((2048, 1365), (3, 2), (3, 2)),
    ],
)
def test_grids_are_the_published_ones(size, most_16, most_8):
    assert (tile_grid(*size, 448, 16), tile_grid(*size, 448, 8)) == (most_16, most_8)


def test_a_box_ends_on_the_last_pixel_and_one_pixel_has_none():
    mask = np.zeros((10, 20), bool)
    mask[4, 6] = True
    assert box_of(mask) == (0.3, 0.4, 0.3, 0.4)
    mask[8, 15] = True
    assert box_of(mask) == (0.3, 0.4, 0.75, 0.8)


# Working ahead.


def test_working_ahead_keeps_the_order_and_the_bound():
    made = []

    def items():
        for number in range(20):
            made.append(number)
            yield number

    drawn = ahead(items(), 3)
    for expected in range(20):
        assert next(drawn) == expected
        time.sleep(0.002)
        assert len(made) <= expected + 1 + 3 + 1, "so many ahead, and one in hand"
    assert list(drawn) == []


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_comes_where_it_would_have_without_the_thread(depth):
    def items():
        yield from "ab"
        raise Broken("here")

    drawn = ahead(items(), depth)
    assert [next(drawn), next(drawn)] == ["a", "b"]
    with pytest.raises(Broken, match="here"):
        next(drawn)


class Broken(Exception):
    pass


def test_closing_ends_the_thread():
    before = threading.active_count()
    drawn = ahead(iter(int, 1), 2)
    assert next(drawn) == 0
    assert threading.active_count() == before + 1
    drawn.close()
    assert threading.active_count() == before
