"""The training loop: fetch, noise, guess, step.

    fit(load_training("configs/train/tiny.yaml"))

A step takes `gradient_accumulation_steps` batches of every rank. Its loss is the weighted sum over all their
examples, divided by the sum of the weights. Noise is drawn from (seed, step, number of the batch within the
step), so that neither a resume nor the number of ranks changes what is drawn for a batch.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from ...pipeline.io import files
from ...schemas.errors import ConfigError, Diverged, StageFailed
from ...schemas.training import Spike, TrainConfig
from ..data import FILLER, Loader, TrainBatch
from ..data.order import key_of
from ..model.perceptiondlm import PerceptionDLM
from ..model.processor import PerceptionDLMProcessor
from . import build, checkpoints, export, metrics
from . import distributed as teams
from . import loss as diffusion
from .checkpoints import Checkpoints
from .distributed import Team
from .metrics import Journal, Meter

_log = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]


class Outcome(NamedTuple):
    """What a run leaves: its steps, how many of them were skipped, and the folder of the model."""

    steps: int
    skipped: int
    model: Path


class Run:
    """All that a run consists of, as it is after `step` steps: new, or from the last whole checkpoint.

    Attributes:
        num_steps: of the whole run.
        step: that is done.
        saved: the last one of which a checkpoint was begun.
        skipped: steps so far that were not taken.
        norms: of the gradient, of the last steps that were taken.
        skipped_now: batches of the steps that were skipped since one was taken last.
    """

    def __init__(self, config: TrainConfig, team: Team):
        on_gpu = team.device.type == "cuda"
        attention = (
            ("flex_attention" if on_gpu else "sdpa") if config.attention == "auto" else config.attention
        )
        if attention == "flex_attention" and not on_gpu:
            raise ConfigError("attention: flex_attention has no gradients on CPUs; take sdpa, or auto")
        self.config, self.team = config, team
        self.model, self.processor = build.open_model(config, attention)
        layers = [*self.model.vision_tower.layers, *self.model.language_model.layers]
        teams.spread(self.model, layers, team, config)
        self.trained = build.trained(self.model)
        self.optimizer = build.make_optimizer(self.model, config)
        self.loader = open_loader(config, self.processor, team)
        self.average = _copies(self.trained) if config.ema_decay else None
        self.step = self.saved = self.skipped = 0
        self.norms: list[float] = []
        self.skipped_now: list[str] = []
        self.folder = Path(config.out)
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", team, config.checkpoint.keep, config.checkpoint.asynchronous
        )
        found = checkpoints.latest(self.checkpoints.folder)
        if found:
            self._resume(found)
        self.num_steps = config.steps or self.step + _steps_left(self.loader, config)

    def _resume(self, path: Path) -> None:
        progress = checkpoints.load(path, self.model, self.optimizer, self.average, self.team)
        self.loader.load_state_dict(progress["loader"])
        self.step = self.saved = progress["step"]
        self.skipped, self.norms = progress["skipped"], progress["norms"]
        self.skipped_now = progress["skipped_now"]
        checkpoints.restore_random(progress["random"], self.team)
        _compare(progress, self.config, self.team)
        if self.team.rank == 0:
            _log.info("resumed from %s", path)

    def save(self) -> None:
        """Write a checkpoint of now."""
        progress = {
            "loader": self.loader.state_dict(),
            "skipped": self.skipped,
            "norms": self.norms,
            "skipped_now": self.skipped_now,
            "random": checkpoints.random_state(self.team),
            "batches_per_step": self.config.gradient_accumulation_steps * self.team.world_size,
            "config": self.config.model_dump(mode="json"),
        }
        state = checkpoints.state_of(self.model, self.optimizer, self.average)
        self.checkpoints.save(self.step, state, progress)
        self.saved = self.step

    def batches(self) -> Iterator[list[TrainBatch]]:
        """Of each step that is left of the run's epochs; without end if it has steps instead.

        No step spans two epochs: where two ranks have a batch and a filler, one rank has a batch.
        """
        while self.config.epochs is None or self.loader.state_dict()["epoch"] < self.config.epochs:
            epoch = iter(self.loader)
            while found := list(islice(epoch, self.config.gradient_accumulation_steps)):
                yield found

    def close(self) -> None:
        """Stop what runs beside."""
        self.loader.close()
        self.checkpoints.close()


def fit(config: TrainConfig, rank: int = 0, world_size: int = 1, report: Report | None = None) -> Outcome:
    """Train, or go on where the last checkpoint is, and write the model to OUT/model.

    Args:
        config: of the run.
        rank: of this process; with more than one rank, torch's process group has been initialised.
        world_size: number of ranks; may be another than the checkpoint's.
        report: called on rank 0 with each step's record.

    Raises:
        ConfigError: something in the configuration cannot be.
        IntegrityError: the checkpoint is damaged, or of other data.
        Diverged: step after step was skipped; names the examples.
        StageFailed: a checkpoint cannot be written, or ranks see different data.
    """
    team = Team(config, rank, world_size)
    run = Run(config, team)
    try:
        with closing(_open_journal(run)) if rank == 0 else nullcontext() as log:
            _train(run, log, report)
        run.checkpoints.finish()
        folder = export.export(run.model, run.processor, run.average, config, team)
        return Outcome(run.step, run.skipped, folder)
    finally:
        run.close()
        team.close()


def _train(run: Run, log: Journal | None, report: Report | None) -> None:
    config, team = run.config, run.team
    peak = config.log.peak_tflops * 1e12 if config.log.peak_tflops else metrics.measure_peak_flops(team)
    stream = run.batches()
    while run.step < run.num_steps:
        meter = Meter(team.device)
        # 1. The step's batches, and what their examples weigh over all ranks.
        with meter.waiting():
            batches = next(stream, None)
        if batches is None:
            break
        weight = float(team.sum(sum(batch.weight_E.double().sum() for batch in batches))) or 1.0
        # 2. Gradients, batch after batch, then over all ranks.
        for number, batch in enumerate(batches):
            found = _backward(run, batch, number, weight)
            meter.add(batch, found, _flops(run.model, batch, len(found.ce_K)))
        teams.sum_gradients(run.trained.values(), team)
        norm = teams.total_norm(run.trained.values())
        total = meter.total(team)
        loss, norm = total["loss"] / weight, float(norm)
        # 3. The step, unless something is wrong with it.
        rates = _set_rates(run)
        why = judge(loss, norm, run.norms, config.spike)
        if why is None:
            _take(run, norm)
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        # 4. What became of it.
        record = metrics.record_of(run.step, loss, norm, meter, total, team, peak) | rates
        record |= _verdict(run, why, batches)
        if log is not None:
            log.write(record)
            if report is not None:
                report(record)
        if len(run.skipped_now) >= config.spike.stop_after:
            _stop(run)
        if run.step % config.checkpoint.every == 0:
            run.save()
    if run.saved != run.step:
        run.save()


def _backward(run: Run, batch: TrainBatch, number: int, weight: float) -> diffusion.Loss:
    """A batch's share of the step's loss and gradient."""
    config, team = run.config, run.team
    place = number * team.world_size + team.rank
    generator = torch.Generator().manual_seed(key_of(config.seed, "noise", run.step, place) >> 1)
    batch = batch.to(team.device)
    noised = diffusion.draw(batch, config.noise, generator)
    with teams.computing(team):
        found = diffusion.loss(run.model, batch, noised, config.noise.loss_weighting)
    (found.total / weight).backward()
    return found


def _take(run: Run, norm: float) -> None:
    """Clip, step, and move the average."""
    config, team = run.config, run.team
    parameters = run.trained.values()
    limit = torch.tensor(norm, device=team.device)
    torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, limit)
    run.optimizer.step()
    run.norms = [*run.norms, norm][-config.spike.window :]
    if run.average is not None:
        taken = run.step - run.skipped
        decay = min(
            config.ema_decay or 0.0, (1 + taken) / (10 + taken)
        )  # the first weights are soon forgotten
        with torch.no_grad():
            for name, parameter in run.trained.items():
                run.average[name].lerp_(parameter, 1 - decay)


def judge(loss: float, norm: float, norms: list[float], spike: Spike) -> str | None:
    """Why a step is not to be taken; None: take it."""
    if not math.isfinite(loss):
        return f"loss {loss}"
    if not math.isfinite(norm):
        return f"gradient {norm}"
    if spike.factor is not None and len(norms) >= spike.window:
        middle = statistics.median(norms)
        if norm > spike.factor * middle:
            return f"gradient {norm:.3g}, {norm / middle:.0f} times the median"
    return None


def share_of_rate(step: int, num_steps: int, warmup: float, final: float) -> float:
    """The schedule: up linearly, then down along a cosine; for the step after `step` steps."""
    rising = math.ceil(warmup * num_steps)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, num_steps - rising)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def _set_rates(run: Run) -> dict[str, float]:
    """Of this step; they follow from its number alone."""
    config, rates = run.config, {}
    share = share_of_rate(run.step, run.num_steps, config.warmup_ratio, config.min_lr_ratio)
    for group in run.optimizer.param_groups:
        group["lr"] = rates[f"lr_{group['part']}"] = group["highest"] * share
    return rates


def _verdict(run: Run, why: str | None, batches: list[TrainBatch]) -> dict[str, Any]:
    """Count a step, and what there is to say of it."""
    found: dict[str, Any] = {"steps": run.num_steps}
    if why or run.config.log.samples:
        found["samples"] = _names(batches, run.team)
    run.skipped += why is not None
    run.skipped_now = (
        [*run.skipped_now, f"step {run.step}, {why}: {', '.join(found['samples'])}"] if why else []
    )
    return found | {"skipped": run.skipped} | ({"why": why} if why else {})


def _stop(run: Run) -> None:
    lines = "\n".join(run.skipped_now)
    raise Diverged(
        f"{len(run.skipped_now)} steps in a row were skipped:\n{lines}\nThe last checkpoint is from before "
        "them or among them: leave these examples out, or lower the learning rate, and run again"
    )


def _names(batches: list[TrainBatch], team: Team) -> list[str]:
    """Of all ranks' examples, in the order of the batches over all ranks."""
    own = [batch.keys for batch in batches]
    rounds = zip(*team.gather(own), strict=True)
    return [key for each in rounds for keys in each for key in keys if key != FILLER]


def open_loader(config: TrainConfig, processor: PerceptionDLMProcessor, team: Team) -> Loader:
    """The loader of this rank."""
    sources = [*config.corpora, *config.conversations]
    pin_memory = team.device.type == "cuda"
    loader = Loader(sources, processor, config.data, config.seed, team.rank, team.world_size, pin_memory)
    if len(found := set(team.gather(loader.fingerprint))) > 1:
        raise StageFailed(f"the ranks do not see the same data: {', '.join(sorted(found))}")
    return loader


def _steps_left(loader: Loader, config: TrainConfig) -> int:
    """Of the run's epochs; the last one of each takes what there is."""
    rounds = [loader.num_steps(epoch) for epoch in range(loader.epoch, config.epochs or 0)]
    if rounds:
        rounds[0] -= loader.position // loader.world_size
    return sum(-(-each // config.gradient_accumulation_steps) for each in rounds)


def _flops(model: PerceptionDLM, batch: TrainBatch, num_logits: int) -> float:
    pairs = metrics.attended_pairs(batch)
    return build.step_flops(
        model, batch.tokens.ids_BL.numel(), pairs, len(batch.images.views_N3SS), num_logits
    )


def _copies(trained: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


def _open_journal(run: Run) -> Journal:
    log = Journal(run.folder, run.config, run.step)
    with files.write_atomic(run.folder / "config.yaml") as file:
        file.write(yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False).encode())
    return log


_HARMLESS = {"out", "checkpoint", "log", "evaluation", "ray"}
_HARMLESS |= {"device", "shard", "attention", "activation_checkpointing", "compile"}


def _stored(config: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's configuration under the names of today, as far as they are known."""
    try:
        return TrainConfig.from_stored(config).model_dump(mode="json")
    except ValidationError:
        return config


def _compare(progress: dict[str, Any], config: TrainConfig, team: Team) -> None:
    """Warn of what differs from the run that wrote the checkpoint, and changes what is learnt."""
    if team.rank:
        return
    before, now = _stored(progress["config"]), config.model_dump(mode="json")
    changed = [key for key in now if key not in _HARMLESS and now[key] != before.get(key)]
    if changed:
        _log.warning(
            "since the checkpoint, %s changed; the run goes on with the new values", ", ".join(changed)
        )
    batches = config.gradient_accumulation_steps * team.world_size
    if batches != progress["batches_per_step"]:
        _log.warning(
            "a step now has %d batches, before %d; set gradient_accumulation_steps so that they are equal",
            batches,
            progress["batches_per_step"],
        )
