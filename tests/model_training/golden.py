"""The original's recorded numbers, beside the repository; tests that need them skip, and say so, without them."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

_ROOT = Path(__file__).resolve().parents[2]


def golden(name: str) -> Path:
    """A file or folder of the golden numbers: in $PARACAPTION_GOLDEN, else `../shared/golden`."""
    home = Path(os.environ.get("PARACAPTION_GOLDEN") or _ROOT.parent / "shared" / "golden") / "perceptiondlm"
    if not (home / name).exists():
        pytest.skip(f"no {home / name}; set PARACAPTION_GOLDEN to the folder of the recorded numbers")
    return home / name


@lru_cache(None)
def tensors(case: str) -> dict[str, Tensor]:
    return load_file(golden(f"{case}/tensors.safetensors"))


def meta(name: str = "meta.json") -> Any:
    return json.loads(golden(name).read_text())


def photo(case: str) -> Image.Image:
    return Image.open(golden(f"{case}/image.png"))


def masks(case: str) -> list[np.ndarray]:
    """In the order in which they were given, HW."""
    files = sorted(golden(case).glob("mask_*.png"))
    return [np.asarray(Image.open(file)) for file in files]


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Equal in shape, and in value but for the tolerance."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance)
