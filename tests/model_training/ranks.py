"""Ranks of a training run as processes of their own, which can be killed for real."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from paracaption.model_training.train import checkpoints, trainer
from paracaption.schemas.training import TrainConfig

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])  # torch is imported once

KILLED = -signal.SIGKILL


def run(config: TrainConfig, world_size: int = 1, **dies: Any) -> list[int]:
    """Train with so many ranks; their exit codes."""
    processes = start(config, world_size, **dies)
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def start(config: TrainConfig, world_size: int = 1, **dies: Any) -> list[BaseProcess]:
    """Start ranks and do not wait for them.

    Args:
        config: of the run.
        world_size: number of ranks.
        dies: the last rank kills itself: `after_step`; or while a checkpoint is written, `in_step` and
            `at`: "files", when some of its files are there, or "name", when all are there under another name.
    """
    store = tempfile.mktemp(prefix="paracaption-store-")
    values = config.model_dump(mode="json")
    processes = [
        _CONTEXT.Process(target=_rank, args=(values, rank, world_size, store, dies))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def _rank(values: dict[str, Any], rank: int, world_size: int, store: str, dies: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # what the survivors of a kill have to say
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    if rank == world_size - 1:
        _arm(**dies)
    trainer.fit(TrainConfig.model_validate(values), rank, world_size)
    if world_size > 1:
        dist.destroy_process_group()
    with contextlib.suppress(FileNotFoundError):
        Path(store).unlink()


def _arm(after_step: int | None = None, in_step: int | None = None, at: str = "") -> None:
    if after_step is not None:
        count_step = trainer._count_step

        def counted(run: trainer.Run, *rest: Any) -> dict[str, Any]:
            if run.step == after_step:
                run.checkpoints.finish()  # so that it is known which checkpoint is the last
                _die()
            return count_step(run, *rest)

        trainer._count_step = counted
    if in_step is not None:
        write, replace = checkpoints.Checkpoints._write, os.replace

        def named(source: Any, target: Any) -> None:
            if Path(target).name.startswith("step-"):
                _die()
            replace(source, target)

        def written(self: checkpoints.Checkpoints, step: int, *rest: Any) -> None:
            if step == in_step and at == "files":
                dcp.FileSystemWriter.finish = _die
            elif step == in_step:
                os.replace = named
            write(self, step, *rest)

        checkpoints.Checkpoints._write = written


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
