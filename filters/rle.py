"""Masks as COCO run-length encodings: made from label maps in one pass, checked without trusting their bytes.

A mask's *counts* are the lengths of its runs of 0 and 1 in turn, first 0, down the columns. COCO packs them
into ASCII: from the fourth on each is the difference to the one before the last, in groups of 5 bits, low
ones first; bit 0x20 says that more follow, 0x10 of the last is the sign, and 48 is added to each. Only one
string is canonical: no run of length 0 but the first, no more groups than needed. pycocotools writes it,
and so do all functions here.

pycocotools' own decoder believes what it is given (it reads past strings that are cut, and allocates what
they ask for), so foreign RLEs go through `check` before they reach it.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..schemas.errors import BadRecord
from ..schemas.reasons import Reason
from ..schemas.records import Rle
from .segmentation_forms import read_counts, read_size, undecodable

_MAX_GROUPS = 12
"""Longest number that is read, in groups of 5 bits: 60 bits stay clear of int64's sign."""


class Mask(NamedTuple):
    """A mask with its measures.

    Attributes:
        rle: the mask, canonical.
        area: number of its pixels.
        bbox: (x, y, width, height) in pixels, exclusive at the far edge; zeros for an empty mask.
    """

    rle: Rle
    area: int
    bbox: tuple[int, int, int, int]


def encode_label_map(labels: np.ndarray) -> dict[int, Mask]:
    """Every segment of a label map at once, from one pass over the runs of its column-major order.

    Args:
        labels: (H, W) unsigned integers, at least one pixel; the label of each pixel.

    Returns:
        The mask of each label that occurs, 0 included, in ascending order; each equal to
        `pycocotools.mask.encode` of `labels == label`, byte for byte.
    """
    height, width = labels.shape
    flat = labels.T.ravel()
    kind = _index_type(flat.size)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1]).astype(kind)
    values = flat[starts]
    order = np.argsort(values, kind="stable")
    values = values[order]
    firsts = starts[order]
    ends = np.append(starts[1:], kind(flat.size))[order]
    heads = np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])
    masks = _from_runs(firsts, ends, heads, height, width)
    return dict(zip(values[heads].tolist(), masks, strict=True))


def from_mask(mask: np.ndarray) -> Mask:
    """The mask of an (H, W) boolean or 0/1 array of at least one pixel."""
    height, width = mask.shape
    flat = np.ascontiguousarray(mask.T).ravel().astype(bool, copy=False)
    edges = np.flatnonzero(np.diff(flat.view(np.int8), prepend=np.int8(0), append=np.int8(0)))
    if not edges.size:
        return Mask(Rle((height, width), _pack_one([flat.size])), 0, (0, 0, 0, 0))
    edges = edges.astype(_index_type(flat.size))
    return _from_runs(edges[0::2], edges[1::2], np.zeros(1, np.int64), height, width)[0]


def check(counts: Any, size: Any) -> Mask:
    """Validate one foreign RLE; see `check_all`.

    Raises:
        BadRecord: MASK_UNDECODABLE, MASK_EMPTY, or SIZE_MISMATCH for a size that is not a possible one.
    """
    height, width = read_size(size)
    found = check_all([{"counts": counts, "size": size}], height, width)[0]
    if isinstance(found, BadRecord):
        raise found
    return found


def check_all(segmentations: Sequence[Any], height: int, width: int) -> list[Mask | BadRecord]:
    """Validate the foreign masks of one image, all at once, and measure them.

    Args:
        segmentations: `{"counts", "size": [height, width]}` with counts compressed (str or bytes) or a list
            of run lengths, or polygons as lists of x, y in turn. Numbers may be text or floats, counts as
            Python prints them, points in pairs, and all of it JSON text or the only element of a list.
        height: of every mask, in pixels.
        width: of every mask, in pixels.

    Returns:
        One entry per segmentation, in order: the mask, canonical (a canonical string is returned unchanged),
        or the error to raise for it: MASK_UNDECODABLE, SIZE_MISMATCH or MASK_EMPTY. Details name no file: the
        caller knows it.
    """
    found: list[Mask | BadRecord] = [undecodable("no mask")] * len(segmentations)
    packed: list[tuple[int, bytes]] = []
    plain: list[tuple[int, np.ndarray]] = []
    for place, segmentation in enumerate(segmentations):
        try:
            counts = read_counts(segmentation, height, width)
        except BadRecord as error:
            found[place] = error
            continue
        packed.append((place, counts)) if isinstance(counts, bytes) else plain.append((place, counts))
    if packed:
        counts, lengths, broken = _unpack([data for _, data in packed], height * width)
        for (place, _), mask in zip(packed, _measure(counts, lengths, broken, height, width), strict=True):
            found[place] = mask
    if plain:
        lengths = np.array([counts.size for _, counts in plain])
        counts = np.concatenate([counts for _, counts in plain])
        masks = _measure(counts, lengths, np.zeros(len(plain), bool), height, width)
        for (place, _), mask in zip(plain, masks, strict=True):
            found[place] = mask
    return found


def to_counts(rle: Rle) -> np.ndarray:
    """The run lengths of a checked RLE: (R,) int64, runs of 0 first."""
    counts, _, broken = _unpack([rle.counts.encode()], rle.size[0] * rle.size[1])
    assert not broken[0], "RLEs are checked when they enter"
    return counts


def to_coco(rle: Rle) -> dict[str, Any]:
    """The form that pycocotools takes."""
    return {"size": list(rle.size), "counts": rle.counts.encode()}


def decode(rle: Rle) -> np.ndarray:
    """The mask of a checked RLE: (H, W) uint8, 0 or 1, column-major as pycocotools has it."""
    height, width = rle.size
    counts = to_counts(rle)
    return np.repeat(np.arange(counts.size, dtype=np.uint8) & 1, counts).reshape(width, height).T


def iou(masks: Sequence[Rle], others: Sequence[Rle], over_first: bool = False) -> np.ndarray:
    """Overlap of each mask with each other one, from the runs alone.

    Args:
        masks: N checked RLEs.
        others: M checked RLEs of the same size.
        over_first: divide by the area of the mask of the first list instead of by the union.

    Returns:
        (N, M) float64 in 0..1.
    """
    if not masks or not others:
        return np.zeros((len(masks), len(others)))
    crowd = [int(over_first)] * len(others)
    return _coco().iou([to_coco(rle) for rle in masks], [to_coco(rle) for rle in others], crowd)


def _coco() -> Any:
    return importlib.import_module("pycocotools.mask")


def _measure(
    counts: np.ndarray, lengths: np.ndarray, broken: np.ndarray, height: int, width: int
) -> list[Mask | BadRecord]:
    """Judge the counts of S masks, and make the good ones' canonical strings.

    Args:
        counts: (C,) int64, run lengths of all masks after one another.
        lengths: (S,) number of counts of each mask.
        broken: (S,) masks whose string did not decode.
        height: of the image.
        width: of the image.
    """
    pixels = height * width
    owner = np.repeat(np.arange(lengths.size), lengths)
    odd = (np.arange(counts.size) - np.repeat(_starts(lengths), lengths)) % 2 == 1
    negative = np.bincount(owner, weights=counts < 0, minlength=lengths.size) > 0
    ends = np.cumsum(counts)
    totals = _sums(ends, lengths)
    good = ~broken & ~negative & (totals == pixels)
    ends -= np.repeat(np.cumsum(totals) - totals, lengths)  # ends of runs, from each mask's first pixel

    ones = odd & (counts > 0) & good[owner]
    firsts, lasts, owners = (ends - counts)[ones], ends[ones], owner[ones]
    # Runs of 1 that touch (a run of 0 between them has length 0) are one run.
    touches = np.zeros(firsts.size, bool)
    touches[1:] = (firsts[1:] == lasts[:-1]) & (owners[1:] == owners[:-1])
    closes = np.append(~touches[1:], True) if touches.size else touches
    firsts, lasts, owners = firsts[~touches], lasts[closes], owners[~touches]
    heads = np.flatnonzero(np.diff(owners, prepend=-1))
    kind = _index_type(pixels)
    masks = iter(_from_runs(firsts.astype(kind), lasts.astype(kind), heads, height, width))
    full = np.zeros(lengths.size, bool)
    full[owners] = True

    found: list[Mask | BadRecord] = []
    for place in range(lengths.size):
        if full[place]:
            found.append(next(masks))
        elif good[place]:
            found.append(BadRecord(Reason.MASK_EMPTY, "no foreground pixel"))
        elif broken[place]:
            found.append(undecodable("`counts` is not an RLE string"))
        elif negative[place]:
            found.append(undecodable("a run of negative length"))
        else:
            detail = f"runs cover {int(totals[place])} pixels, the image has {pixels} ({width}x{height})"
            found.append(undecodable(detail))
    return found


def _from_runs(
    firsts: np.ndarray, ends: np.ndarray, heads: np.ndarray, height: int, width: int
) -> list[Mask]:
    """Masks from their runs of 1.

    Args:
        firsts: (R,) first pixel of each run, column-major; ascending within a mask.
        ends: (R,) the pixel after each run's last; before the first of the mask's next run.
        heads: (S,) position of each mask's first run.
        height: of the image.
        width: of the image.
    """
    if not heads.size:
        return []
    pixels = height * width
    tails = np.append(heads[1:], firsts.size) - 1
    areas = np.add.reduceat(ends - firsts, heads, dtype=np.int64)

    # For each run the zeros before it and its length; after a mask's last run the zeros left, if any.
    before = firsts.copy()
    before[1:] -= ends[:-1]
    before[heads] = firsts[heads]
    left = pixels - ends[tails]
    ended = left > 0
    num_runs = tails - heads + 1
    lengths = 2 * num_runs + ended
    begins = _starts(lengths)
    at = 2 * np.arange(firsts.size) + np.repeat(begins - 2 * heads, num_runs)
    counts = np.empty(int(lengths.sum()), firsts.dtype)
    counts[at] = before
    counts[at + 1] = ends - firsts
    counts[(begins + lengths - 1)[ended]] = left[ended]
    strings = _pack(counts, lengths)

    columns, rows = np.divmod(firsts, height)
    last_columns, last_rows = np.divmod(ends - 1, height)
    wraps = last_columns > columns
    rows[wraps] = 0
    last_rows[wraps] = height - 1
    x = np.minimum.reduceat(columns, heads)
    y = np.minimum.reduceat(rows, heads)
    far_x = np.maximum.reduceat(last_columns, heads)
    far_y = np.maximum.reduceat(last_rows, heads)
    boxes = zip(x.tolist(), y.tolist(), (far_x - x + 1).tolist(), (far_y - y + 1).tolist(), strict=True)
    size = (height, width)
    return [
        Mask(Rle(size, text), area, box)
        for text, area, box in zip(strings, areas.tolist(), boxes, strict=True)
    ]


def _pack(counts: np.ndarray, lengths: np.ndarray) -> list[str]:
    """COCO's strings of S masks from their counts after one another, (C,) signed integers."""
    numbers = counts.copy()
    numbers[2:] -= counts[:-2]
    begins = _starts(lengths)
    for offset in range(3):  # the first three are written as they are
        has = begins[lengths > offset] + offset
        numbers[has] = counts[has]
    magnitude = np.where(numbers < 0, ~numbers, numbers)
    num_groups = np.ones(numbers.size, np.int64)
    reach = 16
    while (more := magnitude >= reach).any():
        num_groups += more
        reach <<= 5
    most = int(num_groups.max())
    characters = np.empty((numbers.size, most), np.uint8)
    for group in range(most):
        characters[:, group] = (numbers >> (5 * group)) & 31
        characters[:, group] += np.where(num_groups > group + 1, 48 + 32, 48).astype(np.uint8)
    text = characters[np.arange(most) < num_groups[:, None]].tobytes().decode("ascii")
    cuts = np.append(0, np.cumsum(_sums(np.cumsum(num_groups), lengths))).tolist()
    return [text[start:end] for start, end in itertools.pairwise(cuts)]


def _pack_one(counts: Iterable[int]) -> str:
    array = np.array(list(counts), np.int64)
    return _pack(array, np.array([array.size]))[0]


def _unpack(strings: list[bytes], pixels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The counts of S strings.

    Returns:
        counts (C,) int64, number of counts of each string (S,), and which strings are no RLE (S,); those have
        counts of 0.
    """
    sizes = np.array([len(data) for data in strings])
    codes = np.frombuffer(b"".join(strings), np.uint8).astype(np.int64) - 48
    owner = np.repeat(np.arange(sizes.size), sizes)
    broken = sizes == 0
    broken[owner[(codes < 0) | (codes > 63)]] = True
    last = (codes & 32) == 0
    stops = np.cumsum(sizes)[sizes > 0] - 1
    broken[owner[stops[~last[stops]]]] = True  # cut inside a number
    last[stops] = True

    finals = np.flatnonzero(last)
    begins = np.append(0, finals[:-1] + 1)[: finals.size]
    num_groups = finals - begins + 1
    owners = owner[finals]
    broken[owners[num_groups > _MAX_GROUPS]] = True
    place = np.minimum(np.arange(codes.size) - np.repeat(begins, num_groups), _MAX_GROUPS - 1)
    groups = (codes & 31) << (5 * place)
    numbers = np.add.reduceat(groups, begins) if finals.size else groups
    signed = (codes[finals] & 16) != 0
    numbers = np.where(signed, numbers - (np.int64(1) << (5 * np.minimum(num_groups, _MAX_GROUPS))), numbers)
    broken[owners[np.abs(numbers) > pixels]] = True  # the difference of two runs of the image is never more
    numbers[broken[owners]] = 0

    lengths = np.bincount(owners, minlength=sizes.size)
    position = np.arange(numbers.size) - np.repeat(_starts(lengths), lengths)
    counts = numbers
    for chain in ((position % 2 == 1), (position % 2 == 0) & (position >= 2)):
        sums = np.cumsum(numbers[chain])
        members = np.bincount(owners[chain], minlength=sizes.size)
        counts[chain] = sums - np.repeat(_bases(sums, members), members)
    return counts, lengths, broken


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Position of each group's first element, for groups after one another."""
    return np.cumsum(lengths) - lengths


def _bases(running: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """What a running sum had reached before each group."""
    return np.append(0, running)[_starts(lengths)]


def _sums(running: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The sum of each group, from the running sum over all of them."""
    return np.append(0, running)[np.cumsum(lengths)] - _bases(running, lengths)


def _index_type(pixels: int) -> type[np.signedinteger[Any]]:
    return np.int32 if pixels < 1 << 30 else np.int64
