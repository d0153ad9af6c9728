"""What neural segmenters and mask generators share: finding the device, and masks into RLEs.

Shapes: N masks, H x W the photo, h x w the model's own mask size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ...schemas.errors import ConfigError, StageFailed
from ...schemas.records import Rle
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


def check_finite(what: str, protocol: str = "segmenter", **outputs: torch.Tensor) -> None:
    """Refuse what a broken model says: NaN compares as false, and would pass for "nothing found".

    Args:
        what: the model, named in the error.
        protocol: of its backend, for the message.
        outputs: tensors by a name for the message.

    Raises:
        StageFailed: a value is NaN or infinite.
    """
    for name, values in outputs.items():
        num_wrong = int((~values.isfinite()).sum())
        if num_wrong:
            raise StageFailed(
                f"{what}: {num_wrong:,} of {values.numel():,} values of {name} are NaN or infinite; the "
                "weights of the model are damaged, or its numbers overflow: download the checkpoint again, "
                f"or set {protocol}.options.dtype to float32"
            )


def to_candidates(
    masks: torch.Tensor,
    scores: torch.Tensor,
    size: tuple[int, int],
    enlarge: Callable[[torch.Tensor], torch.Tensor],
) -> list[Candidate]:
    """Candidates, best first; masks without a pixel are left out.

    Args:
        masks: (N, h, w) of the model's own size.
        scores: (N,) in 0..1.
        size: of the photo, (height, width).
        enlarge: makes (n, H, W) bool of (n, h, w); called on `CHUNK_PX` pixels at once, on fewer if memory
            runs out.
    """
    if not len(masks):
        return []
    best = scores.argsort(descending=True, stable=True)
    batches = Batches(max(1, CHUNK_PX // (size[0] * size[1])), "masks at the photo's size")
    rles = batches.run(best.tolist(), lambda chosen: to_rles(enlarge(masks[list(chosen)])))
    found = zip(rles, scores[best].tolist(), strict=True)
    return [Candidate(rle, score) for rle, score in found if rle is not None]


def to_rles(masks: torch.Tensor) -> list[Rle | None]:
    """COCO's encoding of (N, H, W) bool masks; None for an empty one.

    The runs are found where the masks are, so that no dense mask leaves the GPU.

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
    which, where = (columns[:, 1:] != columns[:, :-1]).nonzero(as_tuple=True)
    ends = np.searchsorted(which.cpu().numpy(), np.arange(1, num_masks))
    found: list[Rle | None] = []
    for edges in np.split(where.cpu().numpy(), ends):
        if not edges.size:
            found.append(None)
            continue
        counts = np.diff(edges, prepend=0, append=height * width)
        runs = {"size": [height, width], "counts": (counts if counts[-1] else counts[:-1]).tolist()}
        encoded: Any = coco.frPyObjects(runs, height, width)  # pyright: ignore
        found.append(Rle((height, width), encoded["counts"].decode()))
    return found
