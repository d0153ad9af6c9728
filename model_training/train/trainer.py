"""The training loop: fetch a step's batches, draw noise, compute gradients, take the step.

    fit(load_training("configs/train/tiny.yaml"))

A step takes `gradient_accumulation_steps` batches of every rank. Its loss is the weighted sum over all their
examples, divided by the sum of the weights. Noise is drawn from (seed, step, number of the batch within the
step), so that neither a resume nor the number of ranks changes what is drawn for a batch.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from ...pipeline.corpus.reader import Corpus
from ...pipeline.io import files
from ...pipeline.io.failures import RETRYING, SourceUnavailable
from ...schemas.errors import ConfigError, Diverged, StageFailed
from ...schemas.training import CorpusSource, Spike, TrainConfig
from ..data import left_out
from ..data.loader import Loader
from ..data.order import key_of
from ..data.samples import FILLER, TrainBatch
from ..model.perceptiondlm import PerceptionDLM
from ..model.processor import PerceptionDLMProcessor
from . import build, checkpoints, distill, distributed, loss, metrics
from .checkpoints import Checkpoints
from .distributed import DistributedGroup
from .dropped import DropCounts
from .export import export_model
from .metrics import MetricsLogger, StepMeter

_log = logging.getLogger(__name__)

NO_EXAMPLE = "no example: all of its items were left out"
"""Why a step is not taken whose batches are fillers only: its gradient of 0 would still move the weights."""

LEFT_OUT = "left_out.json"
"""How many images of the sources are not trained on, by reason."""

Report = Callable[[dict[str, Any]], None]


class Outcome(NamedTuple):
    """What a run leaves.

    Attributes:
        steps, skipped: number of steps, and how many of them were skipped.
        model: the model's folder.
        left_out: how many images of all sources were not trained on, by reason.
    """

    steps: int
    skipped: int
    model: Path
    left_out: dict[str, int]


class Run:
    """Everything that a run consists of, as it is after `step` steps: new, or from the last checkpoint.

    Attributes:
        num_steps: number of steps of the whole run.
        step: number of steps that are done.
        saved: the last step for which a checkpoint was begun.
        sums_once: whether a sharded model sums gradients over the ranks once a step, not after each batch.
        skipped: number of steps so far that were not taken.
        norms: gradient norms of the last steps that were taken.
        skipped_now: a line for each step that was skipped since one was taken last, with its examples.
        ema: moving average of the trained weights by name; None if the run keeps none.
        counts: how many of the data's items became examples.
    """

    def __init__(self, config: TrainConfig, group: DistributedGroup):
        on_gpu = group.device.type == "cuda"
        attention = (
            ("flex_attention" if on_gpu else "sdpa") if config.attention == "auto" else config.attention
        )
        if attention == "flex_attention" and not on_gpu:
            raise ConfigError("attention: flex_attention has no gradients on CPUs; set it to sdpa or auto")
        self.config, self.group = config, group
        self.model, self.processor = build.open_model(config, attention)
        layers = [*self.model.vision_tower.layers, *self.model.language_model.layers]
        distributed.parallelize(self.model, layers, group, config)
        self.trained = build.trainable_parameters(self.model)
        self.sums_once = distributed.sums_once_a_step(self.trained.values(), group, config)
        self.optimizer = build.make_optimizer(self.model, config)
        self.loader = open_loader(config, self.processor, group)
        self.ema = _copies(self.trained) if config.ema_decay else None
        self.step = self.saved = self.skipped = 0
        self.norms: list[float] = []
        self.skipped_now: list[str] = []
        self.counts = DropCounts()
        self.folder = Path(config.out)
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", group, config.checkpoint.keep, config.checkpoint.asynchronous
        )
        found = checkpoints.latest_checkpoint(self.checkpoints.folder)
        if found:
            self._resume(found)
        self.num_steps = config.steps or self.step + _steps_left(self.loader, config)

    def _resume(self, path: Path) -> None:
        progress = checkpoints.load_checkpoint(path, self.model, self.optimizer, self.ema, self.group)
        self.loader.load_state_dict(progress["loader"])
        self.step = self.saved = progress["step"]
        self.skipped, self.norms = progress["skipped"], progress["norms"]
        self.skipped_now = progress["skipped_now"]
        self.counts = DropCounts.restored(progress.get("counts"), self.loader.epoch)
        checkpoints.set_rng_states(progress["random"], self.group)
        _warn_of_changes(progress, self.config, self.group)
        if self.group.rank == 0:
            _log.info("resumed from %s", path)

    def save(self) -> None:
        """Begin to write a checkpoint of the current state."""
        progress = {
            "loader": self.loader.state_dict(),
            "skipped": self.skipped,
            "norms": self.norms,
            "skipped_now": self.skipped_now,
            "counts": self.counts.stored(),
            "random": checkpoints.get_rng_states(self.group),
            "batches_per_step": self.config.gradient_accumulation_steps * self.group.world_size,
            "config": self.config.model_dump(mode="json"),
        }
        state = checkpoints.training_state(self.model, self.optimizer, self.ema)
        self.checkpoints.save(self.step, state, progress)
        self.saved = self.step

    def batches(self) -> Iterator[list[TrainBatch]]:
        """This rank's batches of each step, for the epochs that are left, or without end if `steps` is given.

        No step spans two epochs. Every rank has a batch for every step: where the last step of an epoch has
        fewer batches than ranks, the other ranks have fillers.
        """
        while self.config.epochs is None or int(self.loader.state_dict()["epoch"]) < self.config.epochs:
            epoch = iter(self.loader)
            while found := list(islice(epoch, self.config.gradient_accumulation_steps)):
                yield found

    def close(self) -> None:
        """Stop the processes and threads that run next to the training."""
        self.loader.close()
        self.checkpoints.close()


def fit(config: TrainConfig, rank: int = 0, world_size: int = 1, report: Report | None = None) -> Outcome:
    """Train, or continue from the last checkpoint, and write the model to OUT/model.

    Args:
        config: the run's configuration.
        rank: number of this process. With more than one rank, torch's process group must be initialized.
        world_size: number of ranks; it may differ from the checkpoint's.
        report: called on rank 0 with each step's record.

    Raises:
        ConfigError: the configuration cannot be carried out.
        IntegrityError: the checkpoint is damaged, or belongs to other data.
        Diverged: too many steps in a row were skipped; the message names their examples.
        NothingToTrainOn: everything that an epoch holds was left out, or more than `data.max_dropped_share`;
            no model is written.
        StageFailed: a checkpoint cannot be written, or the ranks see different data.
        SourceUnavailable: a store does not answer, and did not for `data.read_retry_s`; there is a checkpoint
            of the last step.
    """
    RETRYING.set_budget(config.data.read_retry_s)
    group = DistributedGroup(config, rank, world_size)
    run = Run(config, group)
    try:
        with closing(_open_logger(run)) if rank == 0 else nullcontext() as logger:
            _train(run, logger, report)
        run.checkpoints.finish()
        folder = export_model(run.model, run.processor, run.ema, config, group)
        return Outcome(run.step, run.skipped, folder, left_out.total(run.loader.left_out))
    finally:
        run.close()
        group.close()


def _train(run: Run, logger: MetricsLogger | None, report: Report | None) -> None:
    config, group = run.config, run.group
    peak = config.log.peak_tflops * 1e12 if config.log.peak_tflops else metrics.measure_peak_flops(group)
    stream = run.batches()
    while run.step < run.num_steps:
        meter = StepMeter(group.device)
        before = run.loader.state_dict()
        epoch = int(before["epoch"])
        # 1. The step's batches, and the weight of their examples over all ranks.
        with meter.waiting():
            batches = _next_batches(stream)
        if batches is None:
            break
        weight = float(group.all_reduce(_weight_of(batches))) or 1.0
        if math.isnan(weight):
            _end_for_outage(run, before, batches)
        assert not isinstance(batches, SourceUnavailable)
        # 2. Gradients, batch after batch, then over all ranks.
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            distributed.sum_gradients_over_ranks(run.model, is_last or not run.sums_once)
            found = _backward(run, batch, number, weight)
            meter.add(batch, found, _flops(run.model, batch, len(found.ce_K)))
        distributed.all_reduce_gradients(run.trained.values(), group)
        norm = distributed.total_norm(run.trained.values())
        total = meter.total(group)
        mean, norm = total["loss"] / weight, float(norm)
        # 3. The step, unless something is wrong with it.
        rates = _set_learning_rates(run)
        reason = reason_to_skip(mean, norm, run.norms, config.spike) if total["examples"] else NO_EXAMPLE
        if reason is None:
            _optimizer_step(run, norm)
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        # 4. The record of the step.
        record = metrics.step_record(run.step, mean, norm, meter, total, group, peak) | rates
        record |= _count_step(run, reason, batches)
        if logger is not None:
            logger.write(record)
            if report is not None:
                report(record)
        _check_data(run, epoch, total)
        if len(run.skipped_now) >= config.spike.stop_after:
            _stop(run)
        if run.step % config.checkpoint.every == 0:
            run.save()
    run.counts.check_run(config.data.max_dropped_share)
    if run.saved != run.step:
        run.save()


def _next_batches(stream: Iterator[list[TrainBatch]]) -> list[TrainBatch] | SourceUnavailable | None:
    """A step's batches, or why they cannot be had now, which all ranks have to know; None at the end."""
    try:
        return next(stream, None)
    except SourceUnavailable as error:
        return error


def _weight_of(batches: list[TrainBatch] | SourceUnavailable) -> Tensor:
    """The weight of a step's examples on this rank; NaN if it could not read them, which no sum hides."""
    if isinstance(batches, SourceUnavailable):
        return torch.tensor(math.nan, dtype=torch.float64)
    return torch.cat([batch.weight_E.double() for batch in batches]).sum()


def _end_for_outage(
    run: Run, before: dict[str, int | str], found: list[TrainBatch] | SourceUnavailable
) -> NoReturn:
    """Save the last step, and end the run on all ranks; `before` is the loader's state after that step."""
    run.loader.load_state_dict(before)
    if run.saved != run.step:
        run.save()
    run.checkpoints.finish()
    if isinstance(found, SourceUnavailable):
        raise found
    raise SourceUnavailable("the data: another rank could not read them; its message says which and why")


def _check_data(run: Run, epoch: int, total: dict[str, Any]) -> None:
    """Count a step's items and examples over all ranks, and stop the run if too few are left."""
    run.counts.add(epoch, int(total["items"]), int(total["examples"]))
    limit = run.config.data.max_dropped_share
    run.counts.check(limit, run.loader.num_items(epoch))
    if int(run.loader.state_dict()["epoch"]) != epoch:
        run.counts.check_epoch(limit)


def _backward(run: Run, batch: TrainBatch, number: int, weight: float) -> loss.Loss:
    """Add a batch's share of the step's gradient, and return its loss."""
    config, group = run.config, run.group
    batch_in_step = number * group.world_size + group.rank
    seed = key_of(config.seed, "noise", run.step, batch_in_step) >> 1
    found = _loss(run, batch, torch.Generator().manual_seed(seed))
    (found.total / weight).backward()
    return found


def _loss(run: Run, batch: TrainBatch, generator: torch.Generator) -> loss.Loss:
    """The loss of a batch, after a draw of what is masked."""
    config = run.config
    if config.distillation is not None:
        window = distill.window_of(config.distillation, run.step / run.num_steps)
        state = distill.draw_path_state(batch, config.noise, window, generator)
        with distributed.autocast(run.group):
            return distill.path_loss(run.model, batch, state, config.distillation)
    noise = loss.draw_noise(batch, config.noise, generator)
    with distributed.autocast(run.group):
        return loss.diffusion_loss(run.model, batch, noise, config.noise.loss_weighting)


def _optimizer_step(run: Run, norm: float) -> None:
    """Clip the gradients, take the step, and update the EMA."""
    config = run.config
    parameters = run.trained.values()
    norm_on_device = torch.full((), norm, device=run.group.device)  # a copy would wait
    torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm_on_device)
    run.optimizer.step()
    run.norms = [*run.norms, norm][-config.spike.window :]
    if run.ema is not None:
        taken = run.step - run.skipped
        # A smaller decay at the start, so that the first weights are soon forgotten.
        decay = min(config.ema_decay or 0.0, (1 + taken) / (10 + taken))
        with torch.no_grad():
            for name, parameter in run.trained.items():
                run.ema[name].lerp_(parameter, 1 - decay)


def reason_to_skip(mean: float, norm: float, norms: list[float], spike: Spike) -> str | None:
    """Why a step is not to be taken, for its record; None if it is to be taken.

    Args:
        mean: the step's loss.
        norm: the norm of its gradient.
        norms: norms of the last steps that were taken.
        spike: the rule.
    """
    if not math.isfinite(mean):
        return f"loss {mean}"
    if not math.isfinite(norm):
        return f"gradient {norm}"
    if spike.factor is not None and len(norms) >= spike.window:
        median = statistics.median(norms)
        if norm > spike.factor * median:
            return f"gradient {norm:.3g}, {norm / median:.0f} times the median"
    return None


def lr_factor(step: int, num_steps: int, warmup_ratio: float, min_lr_ratio: float) -> float:
    """The learning rate after `step` steps, as a share of the highest: a linear warmup, then a cosine."""
    warmup_steps = math.ceil(warmup_ratio * num_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))


def _set_learning_rates(run: Run) -> dict[str, float]:
    """Set this step's learning rates, which follow from its number alone; returns them for the record."""
    config, rates = run.config, {}
    factor = lr_factor(run.step, run.num_steps, config.warmup_ratio, config.min_lr_ratio)
    for param_group in run.optimizer.param_groups:
        param_group["lr"] = rates[f"lr_{param_group['part']}"] = param_group["highest"] * factor
    return rates


def _count_step(run: Run, reason: str | None, batches: list[TrainBatch]) -> dict[str, Any]:
    """Count a step as taken or skipped; returns the part of its record that the trainer knows."""
    found: dict[str, Any] = {"steps": run.num_steps}
    if reason or run.config.log.samples:
        found["samples"] = _example_names(batches, run.group)
    run.skipped += reason is not None
    if reason == NO_EXAMPLE:  # says nothing of the weights, so it neither adds to a row of steps nor ends one
        return found | {"skipped": run.skipped, "why": reason}
    run.skipped_now = (
        [*run.skipped_now, f"step {run.step}, {reason}: {', '.join(found['samples'])}"] if reason else []
    )
    return found | {"skipped": run.skipped} | ({"why": reason} if reason else {})


def _stop(run: Run) -> None:
    lines = "\n".join(run.skipped_now)
    raise Diverged(
        f"{len(run.skipped_now)} steps in a row were skipped:\n{lines}\nLower "
        "learning_rate and run the same command again. If it happens again, delete the newest checkpoint as "
        "well. To train without some of these examples, remove their records from the data and start again "
        "with a new `out`"
    )


def _example_names(batches: list[TrainBatch], group: DistributedGroup) -> list[str]:
    """The names of all ranks' examples, in the order of the batches over all ranks."""
    own = [batch.keys for batch in batches]
    rounds = zip(*group.all_gather(own), strict=True)
    return [key for each in rounds for keys in each for key in keys if key != FILLER]


def open_loader(config: TrainConfig, processor: PerceptionDLMProcessor, group: DistributedGroup) -> Loader:
    """This rank's loader.

    Raises:
        ConfigError: a source is missing or empty.
        IntegrityError: a corpus is damaged.
        StageFailed: the ranks see different data.
    """
    sources = [*config.corpora, *config.conversations]
    pin_memory = group.device.type == "cuda"
    evaluated = Corpus(config.evaluation.corpus, confined=True).held_out_share if config.evaluation else 0.0
    loader = Loader(
        sources,
        processor,
        config.data,
        config.seed,
        group.rank,
        group.world_size,
        pin_memory=pin_memory,
        held_out_share=evaluated,
        paths=config.distillation and config.distillation.paths,
    )
    if len(found := set(group.all_gather(loader.fingerprint))) > 1:
        raise StageFailed(
            f"the ranks read different data (fingerprints {', '.join(sorted(found))}); make sure that all "
            "nodes read the same corpora and files of conversations, and run again"
        )
    for source, counts in zip(sources, loader.left_out, strict=True):
        if counts and group.rank == 0:
            path = source.corpus if isinstance(source, CorpusSource) else source.path
            _log.warning("%s: left out of training: %s", path, left_out.said(counts))
    return loader


def _steps_left(loader: Loader, config: TrainConfig) -> int:
    """Number of steps in what is left of the run's epochs; the last step of an epoch may be smaller."""
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


def _open_logger(run: Run) -> MetricsLogger:
    logger = MetricsLogger(run.folder, run.config, run.step)
    with files.write_atomic(run.folder / "config.yaml") as file:
        file.write(yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False).encode())
    with files.write_atomic(run.folder / LEFT_OUT) as file:
        file.write(json.dumps(left_out.total(run.loader.left_out)).encode() + b"\n")
    return logger


_HARMLESS = {"out", "checkpoint", "log", "evaluation", "ray"}
_HARMLESS |= {"device", "shard", "sync_each_batch", "attention", "activation_checkpointing", "compile"}
"""Keys that may change between a checkpoint and its resume without changing what is learned."""


def _stored_config(config: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's configuration under today's names, if this version understands it."""
    try:
        return TrainConfig.from_stored(config).model_dump(mode="json")
    except ValidationError:
        return config


def _warn_of_changes(progress: dict[str, Any], config: TrainConfig, group: DistributedGroup) -> None:
    """Warn of what differs from the run that wrote the checkpoint and changes what is learned."""
    if group.rank:
        return
    before, now = _stored_config(progress["config"]), config.model_dump(mode="json")
    changed = [key for key in now if key not in _HARMLESS and now[key] != before.get(key)]
    if changed:
        _log.warning(
            "these keys have changed since the checkpoint: %s; the run continues with the new values",
            ", ".join(changed),
        )
    batches = config.gradient_accumulation_steps * group.world_size
    if batches != progress["batches_per_step"]:
        _log.warning(
            "a step now has %d batches, but before the checkpoint it had %d; to have %d again, stop the run "
            "and set gradient_accumulation_steps to %d divided by the number of workers",
            batches,
            *[progress["batches_per_step"]] * 3,
        )
