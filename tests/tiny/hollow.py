"""Checkpoint files of any size that take no room: the right headers, and zeros where the numbers would be."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_NAMES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}


def write_hollow(path: Path, tensors: Iterable[tuple[str, Any]]) -> Path:
    """Write a safetensors file whose data is one hole.

    For measurements that draw the weights on the device, where 8B would take minutes to draw and to write.

    Args:
        path: the file.
        tensors: (name, tensor); of the tensors, which may be fake, only shape and dtype are read.

    Returns:
        The file.
    """
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        head[name] = {"dtype": _NAMES[str(tensor.dtype)], "shape": shape, "data_offsets": [start, end]}
    written = json.dumps(head).encode()
    written += b" " * (-len(written) % 8)
    with open(path, "wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        file.truncate(8 + len(written) + end)
    return path
