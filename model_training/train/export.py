"""The trained model as a folder that `PerceptionDLM.from_pretrained` and `paracaption caption` take."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from ...pipeline.io import files, tensor_files
from ..convert import leftovers, published
from ..model.config import PerceptionDLMConfig
from ..model.perceptiondlm import PerceptionDLM
from . import build

if TYPE_CHECKING:
    from torch import Tensor

    from ...schemas.training import TrainConfig
    from ..model.processor import PerceptionDLMProcessor
    from .distributed import DistributedGroup

MODEL, EMA = "model", "model-average"


def export_model(
    model: PerceptionDLM,
    processor: PerceptionDLMProcessor,
    ema: dict[str, Tensor] | None,
    config: TrainConfig,
    group: DistributedGroup,
) -> Path:
    """Write OUT/model, and OUT/model-average if there is an EMA, in place of older ones. All ranks call this.

    Args:
        model: the trained model, sharded or not.
        processor: the model's processor, which is saved next to it.
        ema: the moving average of the trained weights by name, or None.
        config: the run's configuration.
        group: the ranks; rank 0 writes.

    Returns:
        The folder of the model.
    """
    weights = _full_weights(model)
    averaged = _gathered(ema, group)
    folder = Path(config.out)
    if group.rank == 0:
        _write(folder / MODEL, weights, model, processor, config, group)
        if averaged:
            _write(folder / EMA, weights | averaged, model, processor, config, group)
    group.barrier()
    return folder / MODEL


def _full_weights(model: PerceptionDLM) -> dict[str, Tensor]:
    """All weights on the CPU of rank 0; on other ranks they may be missing."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast("dict[str, Tensor]", get_model_state_dict(model, options=options))


def _gathered(ema: dict[str, Tensor] | None, group: DistributedGroup) -> dict[str, Tensor]:
    """The EMA on the CPU of rank 0; nothing on other ranks, which help to gather it."""
    from torch.distributed.tensor import DTensor

    found = {}
    for name, each in (ema or {}).items():
        whole = each.full_tensor() if isinstance(each, DTensor) else each
        if group.rank == 0:
            found[name] = whole.cpu()
    return found


def _write(
    target: Path,
    weights: dict[str, Tensor],
    model: PerceptionDLM,
    processor: PerceptionDLMProcessor,
    config: TrainConfig,
    group: DistributedGroup,
) -> None:
    dtype = group.dtype if config.export_dtype == "auto" else getattr(torch, config.export_dtype)
    if config.lora:
        weights = build.merge_lora(weights, config.lora)
    tensors = {name: tensor_files.from_torch(each, dtype) for name, each in sorted(weights.items())}
    saved = cast(PerceptionDLMConfig, copy.deepcopy(model.config))
    saved.architectures, saved.dtype = ["PerceptionDLM"], dtype
    tensor_files.check_tensors(target, tensors, published.shapes(saved))
    temporary = target.with_name(f".{target.name}.partial")  # of rank 0, which alone writes here
    with files.write_folder_atomic(target, replace=True, temporary=temporary) as folder:
        tensor_files.write_file(folder / "model.safetensors", tensors)
        processor.save_pretrained(folder)
        saved.save_pretrained(folder)  # over the processor's, which may say another type
        aside = Path(config.model.path or "") / leftovers.FOLDER
        if config.model.path and aside.is_dir():  # what the way back to the published layout needs
            shutil.copytree(aside, folder / leftovers.FOLDER)
