"""PerceptionDLM at the published 8B shapes: a training step on one device, as the trainer takes it.

The trainer's own parts: FSDP2 (`distributed` of one rank), float32 weights gathered in bfloat16, recomputed
activations, the diffusion loss, clipping, AdamW. Its loader is left out: a step repeats one batch of three
images with six regions each (3,333 positions), with new noise every time.

One GPU does not hold the weights, gradients and moments of 8B in float32 (135 GB). So what is trained is
everything at half the depth; then, at full depth, everything but the language model, and LoRA.

The floor is the arithmetic without recomputation over the peak (so its share is the MFU), and the bytes of
the optimizer's step.
"""

from __future__ import annotations

import statistics
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import perceptiondlm
from benchmarks.gpu.machine import Call, Machine, forget_peak, now, peak_gb
from benchmarks.gpu.rows import Measured, Rows, free
from paracaption.model_training.model.batch import Images, Tokens, pack
from paracaption.model_training.model.perceptiondlm import PerceptionDLM
from paracaption.model_training.train import build, distributed, loss
from paracaption.model_training.train.distributed import DistributedGroup
from paracaption.schemas.training import NoiseOptions

SIZE, IMAGES, REGIONS, WORDS = (1024, 512), 3, 6, 32
STEPS = 5
OPTIMIZER_BYTES = 7 * 4
"""Of each trained number in AdamW: weight, gradient and moments are read, weight and moments written."""

LORA = SimpleNamespace(
    rank=16,
    alpha=32.0,
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)


class Case(NamedTuple):
    """What is trained, and how.

    Attributes:
        name: of the row.
        trained: parts of the model, as `build.part_of` names them.
        layers: of the language model; None: all.
        lora: whether the language model has trained LoRA adapters.
        attention: the kernel.
        compiled: whether layers are compiled, as the trainer does on GPUs.
        shard: "full" is FSDP2, "none" is autocast.
    """

    name: str
    trained: tuple[str, ...] = ("vision", "projector", "language", "prompts")
    layers: int | None = 16
    lora: bool = False
    attention: str = "sdpa"
    compiled: bool = False
    shard: str = "full"


class TrainBatch(NamedTuple):
    """What the loss reads of the trainer's batches."""

    images: Images
    tokens: Tokens
    label_BL: Tensor  # noqa: N815
    weight_E: Tensor  # noqa: N815


def cases(machine: Machine) -> list[Case]:
    """The surest first. FlexAttention has to be compiled, which takes long, and has no gradients on CPUs."""
    found = [
        Case("everything, 16 layers, sdpa"),
        Case("all but the language model, 32 layers, sdpa", ("vision", "projector", "prompts"), None),
        Case("LoRA of rank 16, 32 layers, sdpa", ("projector", "prompts"), None, lora=True),
        Case("everything, 16 layers, sdpa, without FSDP2", shard="none"),
    ]
    if machine.device.type == "cuda":
        name = "everything, 16 layers, flex_attention, compiled"
        found.append(Case(name, attention="flex_attention", compiled=True))
    return found


def run(rows: Rows, machine: Machine) -> None:
    """A row for each case."""
    for case in cases(machine):
        if case.lora and not _has_peft():
            rows.skip(case.name, "missing package: peft")
            continue
        rows.measure(case.name, lambda c=case: measure(machine, c), needs_s=2 if machine.tiny else 12)
        torch.compiler.reset()  # compiled code keeps what it was compiled for
        free()


def _has_peft() -> bool:
    from benchmarks.gpu.parts import Part, missing

    return not missing(Part("", "", 0, ("peft",)))


def measure(machine: Machine, case: Case) -> Measured:
    """The first step, which compiles, then some more; the median of those is the row."""
    options = SimpleNamespace(
        precision="auto", shard=case.shard, device=machine.device.type, activation_checkpointing=True
    )
    options.compile = "always" if case.compiled else "never"
    group = DistributedGroup(options, 0, 1)  # pyright: ignore[reportArgumentType]
    try:
        model = _model(machine, case)
        layers = [*model.vision_tower.layers, *model.language_model.layers]
        distributed.parallelize(model, layers, group, options)  # pyright: ignore[reportArgumentType]
        return _steps(machine, case, model, group)
    finally:
        group.close()


def _model(machine: Machine, case: Case) -> PerceptionDLM:
    config = perceptiondlm.config_of(machine.tiny, case.layers)
    model = perceptiondlm.make(config, machine, torch.float32, case.attention)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(build.part_of(name) in case.trained)
    if case.lora:
        build.add_lora(model, LORA, seed=0)  # pyright: ignore[reportArgumentType]
        model.to(machine.device)  # peft makes its matrices on the CPU
    return model


def _steps(machine: Machine, case: Case, model: PerceptionDLM, group: DistributedGroup) -> Measured:
    batch = batch_of(model)
    trained = build.trainable_parameters(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5)
    generator = torch.Generator().manual_seed(0)
    seconds, flops = [], []
    for number in range(1 + (2 if machine.tiny else STEPS)):
        if number == 1:
            forget_peak(machine.device)
        start = now(machine.device)
        num_logits = _step(model, batch, trained, optimizer, group, generator)
        seconds.append(now(machine.device) - start)
        flops.append(_flops(model, batch, num_logits))
    step_s, flop = statistics.median(seconds[1:]), statistics.median(flops[1:])
    num_trained = sum(parameter.numel() for parameter in trained.values())
    tokens = batch.tokens.ids_BL.numel()
    roofline = machine.roofline([Call(flop), Call(0, OPTIMIZER_BYTES * num_trained)], step_s)
    mfu = flop / step_s / (machine.published or machine.measured).flops
    numbers = {
        "seconds_per_step": step_s,
        "positions": tokens,
        "tokens_per_s": tokens / step_s,
        "regions_per_s": IMAGES * REGIONS / step_s,
        "mfu": mfu,
        "trained_billions": num_trained / 1e9,
        "weights_billions": sum(parameter.numel() for parameter in model.parameters()) / 1e9,
        "peak_gb": peak_gb(machine.device),
        "first_step_s": seconds[0],
        "kernel": case.attention,
        "fsdp2": group.sharded,
    }
    return Measured(
        f"{step_s:.3f} s a step, {tokens / step_s:,.0f} tokens/s, MFU {mfu:.0%}", numbers, roofline
    )


def _step(
    model: PerceptionDLM,
    batch: TrainBatch,
    trained: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    group: DistributedGroup,
    generator: torch.Generator,
) -> int:
    """Noise, loss, gradients, clipping and a step, in the trainer's order; the number of masked tokens."""
    any_batch: Any = batch
    noise = loss.draw_noise(any_batch, NoiseOptions(), generator)
    with distributed.autocast(group):
        found = loss.diffusion_loss(model, any_batch, noise)
    (found.total / batch.weight_E.sum()).backward()
    norm = float(distributed.total_norm(trained.values()))
    limit = torch.tensor(norm, device=group.device)
    torch.nn.utils.clip_grads_with_norm_(trained.values(), 1.0, limit)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return len(found.ce_K)


def batch_of(model: PerceptionDLM) -> TrainBatch:
    """Three images with the captions of their regions, packed into one row."""
    example = perceptiondlm.example(model.config, SIZE, REGIONS, WORDS)
    images, tokens = pack([example] * IMAGES)
    weight_E = torch.ones(IMAGES)
    label_BL = tokens.roles.caption_BL.clone()
    return TrainBatch(images, tokens, label_BL, weight_E)


def _flops(model: PerceptionDLM, batch: TrainBatch, num_logits: int) -> float:
    counts = torch.bincount(batch.tokens.roles.sample_BL.flatten())
    views, tokens = len(batch.images.views_N3SS), batch.tokens.ids_BL.numel()
    return build.step_flops(model, tokens, int((counts**2).sum()), views, num_logits)
