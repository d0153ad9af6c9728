"""The metrics of a run: always metrics.jsonl and TensorBoard, and Weights & Biases if it is configured.

Each line of metrics.jsonl is a step: `loss` and `norm` to the last bit, learning rates, throughput. `ce_0.2`
is the mean cross-entropy of tokens masked with a probability of at most 0.2, `ce_0.4` of those above 0.2 and
up to 0.4, and so on. A resumed run removes the lines after its checkpoint, so that each step has one line.
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
from ...pipeline.io.packages import how_to_install, install_with
from ...schemas.errors import ConfigError
from ..data.order import key_of
from ..model.placement import upload

if TYPE_CHECKING:
    from ...schemas.training import TrainConfig
    from ..data.samples import TrainBatch
    from .distributed import DistributedGroup
    from .loss import Loss

METRICS = "metrics.jsonl"
NUM_LEVELS = 5
"""Number of buckets of the probability of masking: up to 0.2, up to 0.4, and so on."""


class StepMeter:
    """Counts what one step consists of and costs: first this rank's batches, then all ranks' in `total`.

    Attributes:
        waited_s: seconds this rank has waited for data.
    """

    def __init__(self, device: torch.device):
        self.start = time.perf_counter()
        self.waited_s = self.flops = 0.0
        self.counts: Counter[str] = Counter()
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.levels = torch.zeros(2, NUM_LEVELS, dtype=torch.float64, device=device)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which time counts as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - start

    def add(self, batch: TrainBatch, found: Loss, flops: float) -> None:
        """Count a batch and its loss. Fetches nothing from a GPU."""
        real = sum(weight > 0 for weight in batch.weight_E.tolist())
        self.counts["tokens"] += batch.tokens.ids_BL.numel() if real else 0
        self.counts["regions"] += len(batch.images.boxes_R4) if real else 0
        self.counts["examples"] += real
        self.counts["dropped"] += len(batch.skipped)
        self.counts["items"] += batch.num_items
        self.flops += flops
        self.loss += found.total.detach()
        level = (found.probability_K.double() * NUM_LEVELS).long().clamp(0, NUM_LEVELS - 1)
        self.levels[0].index_add_(0, level, found.ce_K.double())
        self.levels[1].index_add_(0, level, torch.ones_like(found.ce_K, dtype=torch.float64))

    def total(self, group: DistributedGroup) -> dict[str, Any]:
        """Sums over all ranks, in one message: loss, counts, FLOPs, seconds; and the loss by noise level."""
        names = ("tokens", "regions", "examples", "dropped", "items")
        plain = [*(float(self.counts[name]) for name in names), self.flops, self.waited_s]
        own = upload(torch.tensor(plain, dtype=torch.float64), self.loss.device)
        every = group.all_reduce(torch.cat([self.loss[None], self.levels.flatten(), own])).tolist()
        loss, sums, numbers = every[0], every[1 : 1 + NUM_LEVELS], every[1 + NUM_LEVELS : 1 + 2 * NUM_LEVELS]
        rest = dict(zip((*names, "flops", "waited_s"), every[1 + 2 * NUM_LEVELS :], strict=True))
        by_level = [ce / count if count else None for ce, count in zip(sums, numbers, strict=True)]
        return {"loss": loss, "by_level": by_level, **rest}


def step_record(
    step: int,
    loss: float,
    norm: float,
    meter: StepMeter,
    total: dict[str, Any],
    group: DistributedGroup,
    peak_flops: float,
) -> dict[str, Any]:
    """A step's line of metrics.jsonl, without what only the trainer knows.

    Args:
        step: number of the step, from 1.
        loss: the step's loss.
        norm: norm of the step's gradient.
        meter: this rank's counts.
        total: sums over all ranks, from `meter.total`.
        group: the ranks.
        peak_flops: operations per second of one device, which MFU is a share of.
    """
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
        "data_wait": total["waited_s"] / group.world_size / seconds,
        "mfu": total["flops"] / group.world_size / seconds / peak_flops,
        "memory_gb": _memory_gb(group.device),
    }


class MetricsLogger:
    """Writes the records of steps; only rank 0 has one.

    Args:
        folder: the run's output folder.
        config: the run's configuration.
        step: the last step that is done. Lines of later steps, which a killed run left, are removed.

    Raises:
        ConfigError: TensorBoard is not installed, or W&B is configured and not installed.
    """

    def __init__(self, folder: Path, config: TrainConfig, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        _drop_after(path, step)
        self.lines = LineWriter(path, encode=lambda record: json.dumps(record).encode())
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            what = f"tensorboard is not installed; {how_to_install('tensorboard')}"
            raise ConfigError(what) from error
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.wandb = _wandb(folder, config) if config.log.wandb else None

    def write(self, record: dict[str, Any]) -> None:
        """Write the record of a step."""
        shown = {name: value if _is_json(value) else repr(value) for name, value in record.items()}
        self.lines.append(shown)
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        for name, value in numbers.items():
            if name != "step":
                self.board.add_scalar(name, value, record["step"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=record["step"])

    def close(self) -> None:
        """Flush and close all outputs."""
        self.lines.close()
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run in the order of the steps; none if it has not begun. `folder` is its output."""
    return [json.loads(line) for line in read_lines(folder / METRICS)]


def last_step(folder: Path) -> int:
    """The last step that has a record; 0 if none has."""
    return max((record["step"] for record in read_metrics(folder)), default=0)


def follow_metrics(folder: Path, seen: int, ended: Event, every_s: float = 0.5) -> Iterator[dict[str, Any]]:
    """The records that a run adds, while it adds them; each step once.

    A run that is restarted writes the file again: then it is read from the beginning again.

    Args:
        folder: the run's output folder.
        seen: records up to this step are left out.
        ended: set when the run has ended; what it has written is still read.
        every_s: seconds between two looks at the file.
    """
    lines, last = LineReader(folder / METRICS), False
    while not last:
        last = ended.wait(every_s)
        for line in lines.new():
            record = json.loads(line)
            if record["step"] > seen:
                seen = record["step"]
                yield record


def measure_peak_flops(group: DistributedGroup) -> float:
    """Operations per second of a large matrix product on this rank's device, as an estimate of its peak."""
    side = 4096 if group.device.type == "cuda" else 512
    generator = torch.Generator(group.device)  # its own, so that training draws the same as without it
    left = torch.randn(side, side, generator=generator, device=group.device, dtype=group.dtype)
    best = math.inf
    for _ in range(5):
        start = _now(group.device)
        torch.mm(left, left)
        best = min(best, _now(group.device) - start)
    return 2 * side**3 / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _is_json(value: Any) -> bool:
    """Whether JSON has such a number; NaN and infinities are written as strings."""
    return not isinstance(value, float) or math.isfinite(value)


def _drop_after(path: Path, step: int) -> None:
    """Keep only the lines up to a step."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path.parent) if record["step"] <= step]
    with files.write_atomic(path) as file:
        file.write("".join(json.dumps(record) + "\n" for record in kept).encode())


def _memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import psutil

    return psutil.Process(os.getpid()).memory_info().rss / 1e9


def _wandb(folder: Path, config: TrainConfig) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"log.wandb: wandb is not installed; {install_with('wandb')}, or remove log.wandb"
        ) from error
    name = f"{folder.name}-{key_of(str(folder.absolute())):016x}"
    options = {"config": config.model_dump(mode="json"), "dir": str(folder)}
    return wandb.init(project=config.log.wandb, id=name, name=folder.name, resume="allow", **options)


def attended_pairs(batch: TrainBatch) -> int:
    """Number of pairs of tokens in the same sequence.

    A few of these do not attend to each other and are counted all the same.
    """
    sample_BL = batch.tokens.roles.sample_BL
    counts = torch.bincount(sample_BL[sample_BL >= 0], minlength=1)
    return int((counts**2).sum())
