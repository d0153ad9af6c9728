"""The ranks that train together: what they add up, tell each other, and how the model is spread over them.

One rank by itself needs no process group, unless the model is sharded: then it has one of its own.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...schemas.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...schemas.training import TrainConfig


class Team:
    """This rank and the others.

    Attributes:
        rank: of this process.
        world_size: number of ranks.
        device: of this rank's model.
        dtype: in which it computes.
        sharded: whether each rank holds a part of the weights (FSDP2), or all of them.
    """

    def __init__(self, config: TrainConfig, rank: int, world_size: int):
        """Join, with a process group that is there already if there is more than one rank.

        Raises:
            ConfigError: a device that is not there.
        """
        self.rank, self.world_size = rank, world_size
        self.device = _device(config)
        on_gpu = self.device.type == "cuda"
        low = config.precision == "bfloat16" or (config.precision == "auto" and on_gpu)
        self.dtype = torch.bfloat16 if low else torch.float32
        self.sharded = config.shard == "full" or (config.shard == "auto" and on_gpu)
        self.owns_group = False
        if self.sharded and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            self.owns_group = True
        self.grouped = dist.is_initialized()

    def close(self) -> None:
        """Leave a process group of its own."""
        if self.owns_group:
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """Of all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """For all ranks."""
        if self.world_size > 1:
            dist.barrier()


def spread(model: nn.Module, layers: Iterable[nn.Module], team: Team, config: TrainConfig) -> None:
    """Make a model in float32 ready to train on this rank's device, in place.

    Weights and their sums stay in float32. Sharded, each layer's are gathered in the computing type while it
    runs; gradients are summed in float32.
    """
    model.train()
    layers = list(layers)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile == "always" or (config.compile == "auto" and team.device.type == "cuda"):
        for layer in layers:
            layer.compile(dynamic=True)
    if not team.sharded:
        model.to(team.device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(team.device.type, (team.world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=team.dtype,
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


def computing(team: Team) -> Any:
    """The context of forward passes: in the computing type if the weights are not gathered in it."""
    cast = team.dtype != torch.float32 and not team.sharded
    return torch.autocast(team.device.type, team.dtype, enabled=cast)


def sum_gradients(parameters: Iterable[nn.Parameter], team: Team) -> None:
    """Over all ranks, in one message; FSDP2 has done it already."""
    if team.sharded or team.world_size == 1:
        return
    gradients = [_gradient(parameter) for parameter in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Of all gradients of all ranks, after they are summed."""
    from torch.distributed.tensor import DTensor

    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:  # a rank whose batches do not use it sums with those whose do
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _device(config: TrainConfig) -> torch.device:
    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise ConfigError("device: cuda, but torch sees no GPU here; set device: cpu, or ray.gpus: 1")
    if config.device == "cpu" or not there:
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
