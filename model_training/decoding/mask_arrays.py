"""Masks as callers hold them in memory: which pixels of such an array are the region.

| values | what counts |
| --- | --- |
| bool; 0 and one other value | what is not 0 |
| floats from 0 to 1 (probabilities) | above 0.5 |
| floats below 0 and above it (SAM's logits) | above 0 |

Anything else could be read in two ways, and is an error that asks for bool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...schemas.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_LOGITS = -1.0
"""Floats that reach so low are logits. Above it they may be probabilities that were resized bicubically."""


def to_bool_mask(mask: ArrayLike, number: int) -> np.ndarray:
    """A caller's mask as bool, of the same shape. One that is bool already is given back as it is.

    Args:
        mask: an array, a tensor on any device, a Pillow image or nested lists.
        number: what messages call it.

    Raises:
        ConfigError: a value is not finite or no number; the values could be probabilities or logits, and the
            two differ; the array is a label map; or a mask of probabilities has the whole image.
    """
    values = to_array(mask, f"mask {number}")
    if values.dtype == bool or not values.size:
        return values.astype(bool, copy=False)
    floats = values.dtype.kind == "f"
    if floats and (wrong := np.count_nonzero(~np.isfinite(values))):
        raise ConfigError(f"mask {number}: {wrong:,} of its values are NaN or infinite; {_GIVE}")
    low, high = values.min(), values.max()
    if low == high and (not floats or low in (0, 1, 255)):
        return values != 0
    two = bool(((values == low) | (values == high)).all())
    if two and low != high and 0 in (low, high) and not (floats and (low < 0 or high <= 0.5)):
        return values != 0
    if not floats:
        raise _unclear(number, f"holds integers from {low} to {high}, as label maps do")
    if not two and (values == np.rint(values)).all():
        raise _unclear(number, f"holds whole numbers from {low:g} to {high:g}, as label maps do")
    return _soft(values, float(low), float(high), number)


def _soft(values: np.ndarray, low: float, high: float, number: int) -> np.ndarray:
    """The region of a mask of probabilities or logits."""
    if low <= _LOGITS:
        return values > 0
    found = values > 0.5
    if (low < 0 or high > 1 or not found.any()) and ((values > 0) != found).any():
        raise _unclear(number, f"holds values from {low:g} to {high:g}, probabilities or logits")
    if found.all():
        raise ConfigError(
            f"mask {number}: all of its values are above 0.5 ({low:g} to {high:g}), so it would be the whole "
            f"image; {_GIVE}"
        )
    return found


def to_array(values: Any, name: str) -> np.ndarray:
    """An array of numbers from an array, a tensor on any device, a Pillow image or nested lists.

    Raises:
        ConfigError: it is not one of these, or does not hold numbers; `name` is what messages call it.
    """
    if hasattr(values, "detach"):  # a tensor, which may lie on a GPU or be of a type that numpy lacks
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    try:
        found = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: not an array ({error}); {_GIVE}") from error
    if found.dtype.kind not in "biuf":
        raise ConfigError(f"{name}: an array of {found.dtype}; {_GIVE}")
    return found


def _unclear(number: int, what: str) -> ConfigError:
    return ConfigError(f"mask {number} {what}, so which pixels are the region is not clear; {_GIVE}")


_GIVE = "give a bool mask, True where the region is"
