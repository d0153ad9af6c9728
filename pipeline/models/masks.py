"""What neural segmenters and mask generators share: finding the device, and masks into RLEs.

Shapes: G things asked for, N masks of each, H x W the photo, h x w the model's own mask size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...schemas.errors import ConfigError, StageFailed
from ...schemas.records import Rle
from ..io.transfers import download, upload
from .batching import Batches
from .protocols import Candidate

if TYPE_CHECKING:
    import torch

CHUNK_PX = 64 << 20
"""Pixels of masks brought to the photo's size at once: 256 MB of float32, 19 masks of an SA-1B photo."""


def find_device(device: str, dtype: str, protocol: str = "segmenter") -> tuple[torch.device, torch.dtype]:
    """The device, and the dtype of matrix products on it; "auto" is a GPU if there is one, with bfloat16.

    Args:
        device: option of a backend.
        dtype: option of a backend.
        protocol: of that backend, for messages.

    Raises:
        ConfigError: no such device here.
    """
    import torch

    cuda = torch.cuda.is_available()
    try:
        found = torch.device(("cuda" if cuda else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise ConfigError(f"{protocol}.options.device: {device!r}: name auto, cpu or cuda") from error
    if found.type == "cuda" and not cuda:
        raise ConfigError(
            f"{protocol}.options.device: this process sees no GPU; "
            f"set {protocol}.num_gpus to 1, or device to cpu"
        )
    if dtype == "auto":
        dtype = "float32" if found.type == "cpu" else "bfloat16"
    return found, getattr(torch, dtype)


def products_in(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype` inside the block; weights, norms and box arithmetic stay in float32."""
    import torch

    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def check_finite(
    what: str, scores: torch.Tensor, masks: torch.Tensor, protocol: str = "segmenter"
) -> np.ndarray:
    """Refuse what a broken model says: NaN compares as false, and would pass for "nothing found".

    Args:
        what: the model, named in the error.
        scores: what it says of its masks, in float32.
        masks: what it says of pixels.
        protocol: of its backend, for the message.

    Returns:
        The scores, on the host, which waits once for them and the check.

    Raises:
        StageFailed: a value is NaN or infinite.
    """
    import torch

    outputs = {"scores": scores, "masks": masks}
    num_wrong_2 = torch.stack([(~values.isfinite()).sum() for values in outputs.values()])
    num_wrong_2, found = download([num_wrong_2, scores])
    for (name, values), num_wrong in zip(outputs.items(), num_wrong_2.tolist(), strict=True):
        if num_wrong:
            raise StageFailed(
                f"{what}: {num_wrong:,} of {values.numel():,} values of {name} are NaN or infinite; the "
                "weights of the model are damaged, or its numbers overflow: download the checkpoint again, "
                f"or set {protocol}.options.dtype to float32"
            )
    return found.numpy()


def to_candidates(
    masks: torch.Tensor,
    scores: np.ndarray,
    size: tuple[int, int],
    enlarge: Callable[[torch.Tensor], torch.Tensor],
    above: float | None = None,
) -> list[list[Candidate]]:
    """Candidates of each thing that was asked for, best first; masks without a pixel are left out.

    Args:
        masks: (G, N, h, w) of the model's own size, N for each of G things.
        scores: (G, N) float32 on the host; those of candidates are cut to 0..1.
        size: of the photo, (height, width).
        enlarge: makes (n, H, W) bool of (n, h, w); called on `CHUNK_PX` pixels at once, on fewer if memory
            runs out. What it is called on may be of several things. The host waits twice for each call.
        above: scores have to be larger; None takes all.
    """
    import torch

    flat = masks.flatten(0, 1)
    wanted_gn = np.ones_like(scores, bool) if above is None else scores > np.float32(above)
    clipped_gn = scores.clip(0, 1)
    chosen = [
        (group, int(number))
        for group, order in enumerate(np.argsort(-clipped_gn, axis=1, kind="stable"))
        for number in order
        if wanted_gn[group, number]
    ]

    def encode(batch: Sequence[tuple[int, int]]) -> list[Rle | None]:
        places = torch.tensor([group * masks.shape[1] + number for group, number in batch])
        return to_rles(enlarge(flat[upload(places, flat.device)]))

    batches = Batches(max(1, CHUNK_PX // (size[0] * size[1])), "masks at the photo's size")
    found: list[list[Candidate]] = [[] for _ in masks]
    for (group, number), rle in zip(chosen, batches.run(chosen, encode), strict=True):
        if rle is not None:
            found[group].append(Candidate(rle, float(clipped_gn[group, number])))
    return found


def to_rles(masks: torch.Tensor) -> list[Rle | None]:
    """COCO's encoding of (N, H, W) bool masks; None for an empty one.

    The runs are found where the masks are, so that no dense mask leaves the GPU. The host waits twice: for
    their number, and for them.

    Raises:
        TypeError: the masks are not bool; compare logits and probabilities with a threshold first.
    """
    import torch
    from pycocotools import mask as coco
    from torch.nn import functional

    if masks.dtype != torch.bool:
        raise TypeError(f"masks of {masks.dtype}; give bool, such as logits > 0 or probabilities > 0.5")
    num_masks, height, width = masks.shape
    columns = functional.pad(masks.transpose(1, 2).reshape(num_masks, height * width), (1, 1))
    which, where = (columns[:, 1:] != columns[:, :-1]).nonzero().cpu().numpy().T
    ends = np.searchsorted(which, np.arange(1, num_masks))
    found: list[Rle | None] = []
    for edges in np.split(where, ends):
        if not edges.size:
            found.append(None)
            continue
        counts = np.diff(edges, prepend=0, append=height * width)
        runs = {"size": [height, width], "counts": (counts if counts[-1] else counts[:-1]).tolist()}
        encoded: Any = coco.frPyObjects(runs, height, width)  # pyright: ignore
        found.append(Rle((height, width), encoded["counts"].decode()))
    return found
