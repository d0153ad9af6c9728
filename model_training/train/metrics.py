"""What a run tells of itself: metrics.jsonl and TensorBoard always, Weights & Biases if configured.

A line of metrics.jsonl is a step: `loss` and `norm` to the last bit, learning rates, throughput; `ce_0.2` is
the mean cross-entropy of tokens masked with a probability up to 0.2, `ce_0.4` of those up to 0.4, and so on.
A run that is resumed forgets the lines after its checkpoint: the file tells of one course of training.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch

from ...pipeline.io import files
from ...pipeline.io.json_lines import LineReader, LineWriter, read_lines
from ...schemas.errors import ConfigError
from ..data.order import key_of

if TYPE_CHECKING:
    from ...schemas.training import TrainConfig
    from ..data import TrainBatch
    from .distributed import Team
    from .loss import Loss

METRICS = "metrics.jsonl"
NUM_LEVELS = 5
"""Buckets of the probability of masking: up to 0.2, 0.4, ..."""


class Meter:
    """Counts what the batches of one step are and cost, on this rank; then what all ranks' are.

    Attributes:
        waited_s: for data.
    """

    def __init__(self, device: torch.device):
        self.start = time.perf_counter()
        self.waited_s = self.flops = 0.0
        self.counts: Counter[str] = Counter()
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.levels = torch.zeros(2, NUM_LEVELS, dtype=torch.float64, device=device)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time within is spent on waiting for data."""
        start = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - start

    def add(self, batch: TrainBatch, found: Loss, flops: float) -> None:
        """A batch and its loss; nothing is fetched from a GPU."""
        real = sum(weight > 0 for weight in batch.weight_E.tolist())
        self.counts["tokens"] += batch.tokens.ids_BL.numel() if real else 0
        self.counts["regions"] += len(batch.images.boxes_R4) if real else 0
        self.counts["examples"] += real
        self.counts["dropped"] += len(batch.skipped)
        self.flops += flops
        self.loss += found.total.detach()
        level = (found.probability_K.double() * NUM_LEVELS).long().clamp(0, NUM_LEVELS - 1)
        self.levels[0].index_add_(0, level, found.ce_K.double())
        self.levels[1].index_add_(0, level, torch.ones_like(found.ce_K, dtype=torch.float64))

    def total(self, team: Team) -> dict[str, Any]:
        """Of all ranks, in one message: loss sum, counts, loss by level, FLOPs, seconds waited."""
        names = ("tokens", "regions", "examples", "dropped")
        plain = [*(float(self.counts[name]) for name in names), self.flops, self.waited_s]
        own = torch.tensor(plain, dtype=torch.float64, device=self.loss.device)
        every = team.sum(torch.cat([self.loss[None], self.levels.flatten(), own])).tolist()
        loss, sums, numbers = every[0], every[1 : 1 + NUM_LEVELS], every[1 + NUM_LEVELS : 1 + 2 * NUM_LEVELS]
        rest = dict(zip((*names, "flops", "waited_s"), every[1 + 2 * NUM_LEVELS :], strict=True))
        by_level = [ce / count if count else None for ce, count in zip(sums, numbers, strict=True)]
        return {"loss": loss, "by_level": by_level, **rest}


def record_of(
    step: int, loss: float, norm: float, meter: Meter, total: dict[str, Any], team: Team, peak_flops: float
) -> dict[str, Any]:
    """The line of a step: everything but what the trainer alone knows."""
    seconds = time.perf_counter() - meter.start
    record: dict[str, Any] = {"step": step, "loss": loss, "norm": norm}
    record |= {name: int(total[name]) for name in ("tokens", "regions", "examples", "dropped")}
    for number, value in enumerate(total["by_level"]):
        if value is not None:
            record[f"ce_{(number + 1) / NUM_LEVELS:.1f}"] = value
    return record | {
        "seconds": seconds,
        "tokens_per_s": total["tokens"] / seconds,
        "regions_per_s": total["regions"] / seconds,
        "data_wait": total["waited_s"] / team.world_size / seconds,
        "mfu": total["flops"] / team.world_size / seconds / peak_flops,
        "memory_gb": _memory_gb(team.device),
    }


class Journal:
    """Writes records; on rank 0 only.

    Args:
        folder: `out`.
        config: of the run.
        step: that is done; later lines of the file are of a run that was killed.

    Raises:
        ConfigError: TensorBoard, or W&B if configured, is not installed.
    """

    def __init__(self, folder: Path, config: TrainConfig, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        _forget(path, step)
        self.lines = LineWriter(path, encode=lambda record: json.dumps(record).encode())
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("tensorboard is not installed; `pip install paracaption[train]`") from error
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.wandb = _wandb(folder, config) if config.log.wandb else None

    def write(self, record: dict[str, Any]) -> None:
        """A step's."""
        shown = {name: value if _is_sound(value) else repr(value) for name, value in record.items()}
        self.lines.append(shown)
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        for name, value in numbers.items():
            if name != "step":
                self.board.add_scalar(name, value, record["step"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=record["step"])

    def close(self) -> None:
        """Flush all."""
        self.lines.close()
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, by step."""
    return [json.loads(line) for line in read_lines(folder / METRICS)]


def last_step(folder: Path) -> int:
    """That there is a record of; 0: none."""
    return max((record["step"] for record in read(folder)), default=0)


def follow(folder: Path, seen: int, ended: Event, every_s: float = 0.5) -> Iterator[dict[str, Any]]:
    """The records of steps after `seen` that a run adds, as it adds them, until it has ended; each step once.

    A run that starts anew writes the file anew: then it is read again from its beginning.
    """
    lines, last = LineReader(folder / METRICS), False
    while not last:
        last = ended.wait(every_s)
        for line in lines.new():
            record = json.loads(line)
            if record["step"] > seen:
                seen = record["step"]
                yield record


def measure_peak_flops(team: Team) -> float:
    """Operations a second of a large matrix product on this rank's device: what a model can hope for."""
    side = 4096 if team.device.type == "cuda" else 512
    dice = torch.Generator(team.device)  # of its own: what training draws stays the same
    left = torch.randn(side, side, generator=dice, device=team.device, dtype=team.dtype)
    best = math.inf
    for _ in range(5):
        start = _now(team.device)
        left @ left
        best = min(best, _now(team.device) - start)
    return 2 * side**3 / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _is_sound(value: Any) -> bool:
    """Whether JSON can say it; NaN and infinities are strings."""
    return not isinstance(value, float) or math.isfinite(value)


def _forget(path: Path, step: int) -> None:
    """Leave the lines up to a step."""
    if not path.exists():
        return
    kept = [record for record in read(path.parent) if record["step"] <= step]
    with files.write_atomic(path) as file:
        file.write("".join(json.dumps(record) + "\n" for record in kept).encode())


def _memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import psutil

    return psutil.Process(os.getpid()).memory_info().rss / 1e9


def _wandb(folder: Path, config: TrainConfig) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "log.wandb: wandb is not installed; `pip install wandb`, or leave it out"
        ) from error
    name = f"{folder.name}-{key_of(str(folder.absolute())):016x}"
    options = {"config": config.model_dump(mode="json"), "dir": str(folder)}
    return wandb.init(project=config.log.wandb, id=name, name=folder.name, resume="allow", **options)


def attended_pairs(batch: TrainBatch) -> int:
    """Pairs of tokens of one sequence; what the pattern forbids within it is little and left in."""
    sample_BL = batch.tokens.structure.sample_BL
    counts = torch.bincount(sample_BL[sample_BL >= 0], minlength=1)
    return int((counts**2).sum())
