"""Images become tiles and a thumbnail; regions become patches that show them and boxes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from paracaption.model_training.model import tiling
from paracaption.model_training.model.layout import CORRECTED, REFERENCE

TILE_PX, PATCH_PX, MAX_TILES = 64, 8, 6
SIDE = TILE_PX // PATCH_PX

sides = st.integers(1, 150)


def grid_of(mask):
    return tiling.tile_grid(mask.shape[1], mask.shape[0], TILE_PX, MAX_TILES)


def patches(mask, layout=CORRECTED, prompt=0):
    """(views, patches) of a mask."""
    return tiling.active_patches(mask, prompt, TILE_PX, PATCH_PX, grid_of(mask), layout)


def canvas(views, grid):
    """Tiles' patches put together again as one (rows, columns) grid."""
    across, down = grid
    tiles = views[: across * down].reshape(down, across, SIDE, SIDE)
    return tiles.swapaxes(1, 2).reshape(down * SIDE, across * SIDE)


@st.composite
def masks(draw, most=3):
    """Up to `most` masks of one size, none empty, of rectangles and single pixels."""
    height, width = draw(sides), draw(sides)
    found = []
    for _ in range(draw(st.integers(1, most))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        bottom, right = draw(st.integers(top, height - 1)), draw(st.integers(left, width - 1))
        mask = np.zeros((height, width), bool)
        mask[top : bottom + 1, left : right + 1] = True
        found.append(mask)
    return found


@given(sides, sides, st.integers(1, 12))
def test_the_grid_is_the_nearest_in_aspect_and_never_too_large(width, height, max_tiles):
    across, down = tiling.tile_grid(width, height, TILE_PX, max_tiles)
    assert 1 <= across * down <= max_tiles
    distance = abs(width / height - across / down)
    assert all(
        distance <= abs(width / height - a / d)
        for a in range(1, max_tiles + 1)
        for d in range(1, max_tiles // a + 1)
    )


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((1, 1000), (1, 6)),
        ((1000, 1), (6, 1)),
        ((1, 1), (1, 1)),
        ((90, 90), (1, 1)),
        ((91, 91), (2, 2)),  # of equals the larger, once half of its pixels are there
        ((80, 20), (4, 1)),
    ],
)
def test_grids_of_unusual_sizes(size, grid):
    assert tiling.tile_grid(*size, TILE_PX, MAX_TILES) == grid
    assert tiling.num_views(grid) == (1 if grid == (1, 1) else grid[0] * grid[1] + 1)


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (1, 1), (3, 7), (200, 90)])
def test_images_of_any_size_become_tiles_row_by_row_and_a_thumbnail(size):
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    grid = tiling.tile_grid(width, height, TILE_PX, MAX_TILES)
    views = tiling.cut_image(pixels, TILE_PX, grid)
    assert views.shape == (tiling.num_views(grid), 3, TILE_PX, TILE_PX)
    assert views.dtype == np.uint8
    assert views.flags.c_contiguous


def test_tiles_hold_their_own_part_of_the_image():
    pixels = np.zeros((2 * TILE_PX, 3 * TILE_PX, 3), np.uint8)
    for row in range(2):
        for column in range(3):
            here = (
                slice(row * TILE_PX, (row + 1) * TILE_PX),
                slice(column * TILE_PX, (column + 1) * TILE_PX),
            )
            pixels[here] = 10 * (3 * row + column) + np.arange(3)
    views = tiling.cut_image(pixels, TILE_PX, (3, 2))
    for tile in range(6):  # an image that fits exactly is not resampled
        for channel in range(3):
            assert set(np.unique(views[tile, channel])) == {10 * tile + channel}
    assert views[6, 0, 0, 0] < 5 < 45 < views[6, 0, -1, -1]


def test_pillows_order_of_passes_does_not_matter(monkeypatch):
    """Pillow 13 takes whichever order is cheaper; weights were trained on across first."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 300, 3), np.uint8)
    resize = Image.Image.resize

    def down_first(self, size, resample, *rest, **options):
        half = resize(self, (self.width, size[1]), resample, *rest, **options)
        return resize(half, size, resample, *rest, **options)

    now = tiling.cut_image(pixels, TILE_PX, (6, 1))
    mask = pixels[..., 0] > 128
    painted = tiling.paint_prompt(mask, 3, (6 * TILE_PX, TILE_PX))
    one_call = np.asarray(Image.fromarray(pixels).resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC))
    monkeypatch.setattr(Image.Image, "resize", down_first)
    other = np.asarray(Image.fromarray(pixels).resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC))
    assert (one_call != other).any(), "the order shows in this image"
    np.testing.assert_array_equal(tiling.cut_image(pixels, TILE_PX, (6, 1)), now)
    np.testing.assert_array_equal(tiling.paint_prompt(mask, 3, (6 * TILE_PX, TILE_PX)), painted)


def overlap(size, cells):
    """How much of each cell each pixel is, pair by pair."""
    return np.array(
        [
            [max(0, min((c + 1) * size / cells, i + 1) - max(c * size / cells, i)) for i in range(size)]
            for c in range(cells)
        ]
    ) * (cells / size)


@settings(deadline=None, max_examples=40)
@given(masks(most=1))
def test_a_patch_shows_a_region_that_covers_a_quarter_of_it(found):
    [mask] = found
    grid, views = grid_of(mask), patches(mask)
    sizes = [grid] + [(1, 1)] * (grid != (1, 1))
    shown = [canvas(views, grid)] + [views[-1].reshape(SIDE, SIDE)] * (grid != (1, 1))
    for (across, down), found_here in zip(sizes, shown, strict=True):
        share = overlap(mask.shape[0], down * SIDE) @ mask @ overlap(mask.shape[1], across * SIDE).T
        clear = abs(share - 0.25) > 1e-6
        if (share > 0.25).any():
            np.testing.assert_array_equal(found_here[clear], (share >= 0.25)[clear])
        else:  # the patches that hold most of it
            assert (share[found_here] >= min(share.max(), 0.25) - 1e-6).all()


@settings(deadline=None)
@given(masks())
@example([np.eye(29, dtype=bool)[14:15].repeat(29, 0) & np.eye(29, dtype=bool)])
def test_a_region_that_exists_has_a_patch_in_every_view(found):
    for mask in found:
        assert patches(mask).any(axis=1)[-1], "the thumbnail, or the only tile"
        grid = grid_of(mask)
        assert patches(mask)[: grid[0] * grid[1]].any()


@pytest.mark.parametrize("width", [29, 38, 44, 49, 52, 58])
def test_no_column_of_pixels_is_lost_between_two_patches(width):
    """A filter that gives each pixel to the patch that its middle is in loses some that are on an edge."""
    for column in range(width):
        mask = np.zeros((width // 3, width), bool)
        mask[2, column] = True
        views = patches(mask)
        assert grid_of(mask)[0] == 3
        assert 1 <= views[:3].sum() <= 2
        assert 1 <= views[-1].sum() <= 2


@given(masks(most=2))
def test_disjoint_regions_together_show_at_least_where_each_one_covers_enough(found):
    """Alone, a region may show in a patch that holds too little of it, for want of a better one."""
    first, second = found[0], found[-1] & ~found[0]
    if not second.any():
        return
    both = patches(first | second)
    for part in (first, second):
        share = overlap(part.shape[0], grid_of(part)[1] * SIDE) @ part
        share = share @ overlap(part.shape[1], grid_of(part)[0] * SIDE).T
        shown = canvas(patches(part), grid_of(part)) & (share > 0.25 + 1e-6)
        assert (canvas(both, grid_of(part)) | ~shown).all()


@settings(max_examples=30)
@given(sides, sides, st.floats(0.01, 1.0))
def test_a_region_that_is_the_whole_image_shows_in_every_patch(height, width, share):
    mask = np.ones((height, width), bool)
    assert patches(mask, dataclasses.replace(CORRECTED, min_patch_share=share)).all()
    assert patches(mask, REFERENCE).all()


def test_the_share_that_is_asked_for_decides():
    mask = np.zeros((TILE_PX, TILE_PX), bool)
    mask[: PATCH_PX // 2, :PATCH_PX] = True  # half of the first patch
    mask[PATCH_PX : 2 * PATCH_PX, :PATCH_PX] = True  # the patch below, all of it
    for share, expected in ((0.5, 2), (0.51, 1), (1.0, 1)):
        assert patches(mask, dataclasses.replace(CORRECTED, min_patch_share=share)).sum() == expected


def test_a_region_too_small_for_any_patch_shows_where_most_of_it_is():
    mask = np.zeros((TILE_PX, TILE_PX), bool)
    mask[9, 9:11] = True  # in patch (1, 1)
    mask[30, 30] = True  # in patch (3, 3)
    assert np.argwhere(patches(mask).reshape(SIDE, SIDE)).tolist() == [[1, 1]]


def test_the_reference_lets_the_first_pixel_of_a_patch_decide():
    mask = np.zeros((TILE_PX, TILE_PX), bool)
    mask[8, 8] = True
    mask[9:16, 17:24] = True  # most of patch (1, 2), but not its first pixel
    shown = patches(mask, REFERENCE).reshape(SIDE, SIDE)
    assert np.argwhere(shown).tolist() == [[1, 1]]
    mask[8, 8] = False
    assert not patches(mask, REFERENCE).any(), "and so a region can vanish"
    assert np.argwhere(patches(mask).reshape(SIDE, SIDE)).tolist() == [[1, 2]]


def test_an_empty_mask_shows_nowhere():
    for layout in (CORRECTED, REFERENCE):
        assert not patches(np.zeros((50, 120), bool), layout).any()


@pytest.mark.parametrize("prompt", range(6))
def test_with_an_exact_size_both_ways_show_whole_patches_alike(prompt):
    mask = np.zeros((TILE_PX, TILE_PX), bool)
    mask[16:32, 8:40] = True
    np.testing.assert_array_equal(patches(mask), patches(mask, REFERENCE, prompt))
    assert patches(mask).sum() == 2 * 4


@settings(max_examples=30)
@given(masks(most=1))
def test_boxes_end_beyond_the_last_pixel_or_at_it(found):
    [mask] = found
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    near = (columns.min() / width, rows.min() / height)
    far = ((columns.max() + 1) / width, (rows.max() + 1) / height)
    assert tiling.mask_box(mask, inclusive=False) == (*near, *far)
    assert tiling.mask_box(mask, inclusive=True) == (*near, columns.max() / width, rows.max() / height)


def test_a_region_of_one_pixel_has_a_box_only_if_its_far_edge_counts():
    mask = np.zeros((10, 20), bool)
    mask[3, 5] = True
    assert tiling.mask_box(mask, inclusive=False) == (5 / 20, 3 / 10, 6 / 20, 4 / 10)
    assert tiling.mask_box(mask, inclusive=True) == (5 / 20, 3 / 10, 5 / 20, 3 / 10)


def test_regions_are_sorted_by_area_and_of_equals_the_later_one_is_first():
    found = [np.zeros((6, 6), bool) for _ in range(5)]
    for mask, area in zip(found, (4, 9, 4, 36, 1), strict=True):
        mask.reshape(-1)[:area] = True
    assert tiling.sort_by_area(found) == [3, 1, 2, 0, 4]
    assert tiling.sort_by_area([]) == []
