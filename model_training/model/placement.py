"""Where a model's weights are: on its device, or offloaded by the `device_map` of transformers.

accelerate fetches an offloaded weight when its module's `forward` begins, and drops it when that ends.
Between calls the parameter is on torch's meta device, which has shapes and no values. Whoever reads a weight
outside of `forward` reads it within `fetched`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...pipeline.io.transfers import upload as upload
from ...schemas.errors import ConfigError


@contextmanager
def fetched(module: nn.Module) -> Iterator[Tensor]:
    """The `weight` of a module, where the module computes.

    Raises:
        ConfigError: it has no values, and nothing that could fetch them.
    """
    weight: Any = module.weight
    if not weight.is_meta:
        yield weight
        return
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        raise ConfigError(f"a weight of shape {tuple(weight.shape)} is not loaded; load the model again")
    hook.pre_forward(module)
    try:
        yield module.weight  # pyright: ignore[reportReturnType]
    finally:
        hook.post_forward(module, None)


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes; the meta device if no weight is anywhere."""
    for parameter in model.parameters():
        if not parameter.is_meta:
            return parameter.device
    found = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return torch.device("meta" if found is None else found)


def check_placement(model: nn.Module) -> None:
    """Refuse a model that would compute with what is not there, or on several devices at once.

    Raises:
        ConfigError: a weight has no values and is not offloaded, or weights are on more than one device.
    """
    name = getattr(model, "name_or_path", "") or "the model"
    offloads = bool(getattr(model, "hf_device_map", None))
    devices = set()
    for weight, parameter in model.named_parameters():
        if not parameter.is_meta:
            devices.add(str(parameter.device))
        elif not offloads:
            raise ConfigError(
                f"{name}: {weight} is not loaded (it is on the meta device); load the model again"
            )
    if len(devices) > 1:
        raise ConfigError(
            f"{name}: its weights are on {' and '.join(sorted(devices))}; load it on one device. "
            "What does not fit there, device_map can offload to cpu or disk"
        )
