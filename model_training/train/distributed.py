"""The group of ranks that train together: its collectives, and how the model is spread over it.

One rank by itself needs no process group, unless the model is sharded: then it has one of its own.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...schemas.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...schemas.training import TrainConfig


GRADIENT_SHARE = 0.25
"""Share of a device's memory that unsharded gradients may take, by default."""


class DistributedGroup:
    """This rank, and what it does together with the others.

    Attributes:
        rank: number of this process.
        world_size: number of ranks.
        device: device of this rank's model.
        dtype: type in which the model computes.
        sharded: whether each rank holds a part of the weights (FSDP2) or all of them.
        has_process_group: whether torch's process group exists; one unsharded rank has none.
    """

    def __init__(self, config: TrainConfig, rank: int, world_size: int):
        """Join the group. With more than one rank, torch's process group must have been initialized.

        Raises:
            ConfigError: the configuration asks for a GPU, and torch sees none.
        """
        self.rank, self.world_size = rank, world_size
        self.device = _choose_device(config)
        on_gpu = self.device.type == "cuda"
        low = config.precision == "bfloat16" or (config.precision == "auto" and on_gpu)
        self.dtype = torch.bfloat16 if low else torch.float32
        self.sharded = config.shard == "full" or (config.shard == "auto" and on_gpu)
        self._owns_process_group = False
        if self.sharded and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
            self._owns_process_group = True
        self.has_process_group = dist.is_initialized()

    def close(self) -> None:
        """Destroy the process group if it was made here."""
        if self._owns_process_group:
            dist.destroy_process_group()

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in the order of the ranks. A value can be anything that pickles."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait until all ranks have come here."""
        if self.world_size > 1:
            dist.barrier()


def parallelize(
    model: nn.Module, layers: Iterable[nn.Module], group: DistributedGroup, config: TrainConfig
) -> None:
    """Prepare a float32 model for training on this rank's device, in place.

    Weights and sums of gradients stay in float32. If the model is sharded, a layer's weights are gathered in
    the computing type while it runs.

    Args:
        model: the whole model; it is put in training mode.
        layers: the modules that are compiled and sharded one by one.
        group: the ranks to shard over.
        config: says whether to checkpoint activations and whether to compile.
    """
    model.train()
    layers = list(layers)
    if config.activation_checkpointing:
        enable: Any = model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile == "always" or (config.compile == "auto" and group.device.type == "cuda"):
        for layer in layers:
            layer.compile(dynamic=True)
    if not group.sharded:
        model.to(group.device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(group.device.type, (group.world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=group.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # boxes need their bits; embeddings have the weights' type
    )
    for module in [*layers, model]:  # moves one to the device after the other
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A sum, not a mean: losses are divided by the weight of all ranks. In a form that gloo knows too.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def autocast(group: DistributedGroup) -> torch.autocast:
    """The context of forward passes: casts to the computing type, unless FSDP2 gathers weights in it."""
    cast_here = group.dtype != torch.float32 and not group.sharded
    return torch.autocast(group.device.type, group.dtype, enabled=cast_here)


def sums_once_a_step(
    parameters: Iterable[nn.Parameter], group: DistributedGroup, config: TrainConfig
) -> bool:
    """Whether a sharded model sums gradients over all ranks once a step, and not after each batch.

    Until they are summed, a rank holds the gradients of all parameters in float32, and not only of its share.
    By default that is done where they take at most a quarter of the device's memory.

    Args:
        parameters: the trained parameters, of all ranks together.
        group: the ranks; one by itself has nobody to wait for, and would only pay with memory.
        config: `sync_each_batch` and `gradient_accumulation_steps` are used.
    """
    if not group.sharded or group.world_size == 1 or config.gradient_accumulation_steps == 1:
        return False
    if config.sync_each_batch is not None:
        return not config.sync_each_batch
    num_bytes = sum(parameter.numel() for parameter in parameters) * torch.float32.itemsize
    least = min(group.all_gather(_memory_bytes(group.device)))  # all ranks decide alike
    return num_bytes <= GRADIENT_SHARE * least


def sum_gradients_over_ranks(model: nn.Module, whether: bool) -> None:
    """Say whether the next backward pass of a sharded model sums gradients over all ranks.

    A pass that does so also sums what the passes before it left. Does nothing without FSDP2.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(whether)


def all_reduce_gradients(parameters: Iterable[nn.Parameter], group: DistributedGroup) -> None:
    """Sum gradients over all ranks, in one message. Does nothing with FSDP2, which has summed them."""
    if group.sharded or group.world_size == 1:
        return
    gradients = [_gradient(parameter) for parameter in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all summed gradients, over all ranks if they are sharded."""
    from torch.distributed.tensor import DTensor

    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:  # a rank whose batches do not use it sums with those whose do
        parameter.grad = torch.zeros_like(parameter)
    return cast(Tensor, parameter.grad)


def _memory_bytes(device: torch.device) -> int:
    """Memory of a device; of a CPU, that of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return psutil.virtual_memory().total


def _choose_device(config: TrainConfig) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("device: cuda, but torch sees no GPU here; set device: cpu, or ray.gpus: 1")
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
