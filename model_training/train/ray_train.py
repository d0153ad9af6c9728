"""Training in this process, or on Ray Train's workers over a cluster.

Ray starts the workers, connects them, and restarts all of them when one is lost. Each worker calls
`trainer.fit`, which continues from the last complete checkpoint, so that Ray holds nothing of a run's state.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...schemas.errors import ConfigError, Diverged, NothingToTrainOn, ParaCaptionError, StageFailed
from ...schemas.training import TrainConfig

if TYPE_CHECKING:
    from .trainer import Outcome, Report


_FINAL = {kind.__name__: kind for kind in (Diverged, NothingToTrainOn)}
"""Errors that a restart from the last checkpoint would meet again."""


def train(config: TrainConfig, ray_address: str | None = None, report: Report | None = None) -> Outcome:
    """Train, or continue from the last checkpoint.

    Args:
        config: the run's configuration. With `ray.workers`, Ray's workers train; without, this process does.
        ray_address: "auto" or "host:port" of a running cluster; None starts Ray on this machine.
        report: called with each step's record, soon after the step.

    Raises:
        ConfigError: the configuration cannot be carried out.
        IntegrityError: a checkpoint or the data are damaged.
        Diverged: too many steps in a row were skipped.
        NothingToTrainOn: too many samples were left out.
        StageFailed: a checkpoint cannot be written, or workers were lost more often than `ray.max_failures`.
    """
    if not config.ray.workers:
        if ray_address is not None:
            raise ConfigError("--ray-address: the configuration asks for no workers; set ray.workers")
        from .trainer import fit

        return fit(config, report=report)
    _start(config, ray_address)
    with _following(Path(config.out), report):
        return _fit_on_ray(config)


def _start(config: TrainConfig, address: str | None) -> None:
    import ray

    if ray.is_initialized():
        return
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False}
    if address is not None:
        ray.init(address=address, **quiet)
    else:  # logical CPUs only admit workers, the kernel shares the real ones
        needed = int(config.ray.workers * config.ray.cpus) + 1
        ray.init("local", num_cpus=max(os.cpu_count() or 1, needed), include_dashboard=False, **quiet)


def _fit_on_ray(config: TrainConfig) -> Outcome:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    on_gpu = config.ray.gpus > 0 and config.device != "cpu"
    resources = {"CPU": config.ray.cpus} | ({"GPU": config.ray.gpus} if on_gpu else {})
    trainer = TorchTrainer(
        _work,
        train_loop_config={"config": config.model_dump(mode="json")},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.ray.workers, use_gpu=on_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=config.out,
            failure_config=FailureConfig(max_failures=config.ray.max_failures),
        ),
    )
    try:
        result: Any = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _cause(error, config) from error
    if "error" in result:
        raise _FINAL[result["kind"]](result["error"])
    from .trainer import Outcome

    return Outcome(**result | {"model": Path(result["model"])})


def _work(loop: dict[str, Any]) -> dict[str, Any]:
    """Train in a worker; what it returns goes through Ray."""
    import ray.train

    from .trainer import fit

    context = ray.train.get_context()
    try:
        done = fit(
            TrainConfig.model_validate(loop["config"]), context.get_world_rank(), context.get_world_size()
        )
    except tuple(_FINAL.values()) as error:  # returned, since Ray retries what is raised
        return {"error": str(error), "kind": type(error).__name__}
    return done._asdict() | {"model": str(done.model)}


def _cause(error: Exception, config: TrainConfig) -> ParaCaptionError:
    """Our error that a worker raised; or, if it was none of ours, that the workers failed."""
    for failure in getattr(error, "worker_failures", {}).values():
        raised = getattr(failure, "_base_exc", failure)
        if isinstance(raised, ParaCaptionError):
            return raised
    return StageFailed(
        f"training stopped after {config.ray.max_failures} restarts (ray.max_failures): {error}; "
        "run the same command again to go on from the last checkpoint"
    )


@contextmanager
def _following(out: Path, report: Report | None) -> Iterator[None]:
    """While the context lasts, report the records that a worker adds to the metrics."""
    if report is None:
        yield
        return
    from . import metrics

    ended, seen = threading.Event(), metrics.last_step(out)

    def work() -> None:
        for record in metrics.follow_metrics(out, seen, ended):
            report(record)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
