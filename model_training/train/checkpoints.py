"""Checkpoints of a training run: whole or not there, written while training goes on, for any number of ranks.

    OUT/checkpoints/step-00000500/       weights, optimizer and average, by torch's distributed checkpoint
    OUT/checkpoints/step-00000500/progress.json    step, loader, random numbers, configuration
    OUT/checkpoints/.step-00001000.partial/        being written, or left by a run that was killed

A folder gets its name when all of it is on the disk. Frozen weights are not in it: they come from the model
that the run started from. Its files are pickles: resume from your own.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ...pipeline.io import files
from ...schemas.errors import IntegrityError, StageFailed, one_line

if TYPE_CHECKING:
    from torch import Tensor

    from .distributed import Team

PROGRESS = "progress.json"
_NAME = re.compile(r"step-(\d{8})")


class Checkpoints:
    """The checkpoints of a folder. All ranks call the same methods in the same order.

    Args:
        folder: on a file system that all ranks share.
        team: the ranks.
        keep: how many are kept.
        asynchronous: `save` returns when a copy is in memory; at most one is being written.
    """

    def __init__(self, folder: Path, team: Team, keep: int = 3, asynchronous: bool = True):
        self.folder, self.team, self.keep, self.asynchronous = folder, team, keep, asynchronous
        # The writing thread's messages must not meet the trainer's.
        self.group = dist.new_group(backend="gloo") if team.grouped else None
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None
        if team.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".step-*.partial"):
                shutil.rmtree(left)
        team.wait()

    def save(self, step: int, state: dict[str, Any], progress: dict[str, Any]) -> None:
        """Write a checkpoint, and remove the oldest if there are too many.

        Args:
            step: that is done.
            state: see `state_of`.
            progress: JSON; the same on all ranks.
        """
        self.finish()
        staged = _copied(state)
        self.writing = self.pool.submit(self._write, step, staged, progress)
        if not self.asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, on all ranks.

        Raises:
            StageFailed: it cannot be written.
        """
        from torch.distributed.checkpoint.api import CheckpointException

        writing, self.writing = self.writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (OSError, CheckpointException) as error:
            raise StageFailed(
                f"{self.folder}: the checkpoint cannot be written ({one_line(error)}); make room and run "
                "again: training goes on from the one before"
            ) from error

    def close(self) -> None:
        """Let the one that is being written be finished, whatever has happened to the training."""
        self.pool.shutdown()

    def _write(self, step: int, state: dict[str, Any], progress: dict[str, Any]) -> None:
        import torch.distributed.checkpoint as dcp

        target, partial = self.folder / f"step-{step:08}", self.folder / f".step-{step:08}.partial"
        writing = nullcontext(partial)  # all ranks write into one folder, and rank 0 gives it its name
        if self.team.rank == 0:  # `replace`: a run resumed from an older checkpoint comes here again
            writing = files.write_folder_atomic(target, replace=True, temporary=partial)
        with warnings.catch_warnings(), writing:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            # Returns on rank 0 when every rank has written and synchronised its files.
            dcp.save(
                state,
                storage_writer=dcp.FileSystemWriter(partial),
                process_group=self.group,
                no_dist=self.group is None,
            )
            if self.team.rank == 0:
                (partial / PROGRESS).write_text(json.dumps({"step": step, **progress}))
        if self.team.rank == 0:
            self._prune()

    def _prune(self) -> None:
        for old in whole(self.folder)[: -self.keep]:
            hidden = old.with_name(f".{old.name}.partial")  # a killed removal leaves none that looks whole
            os.replace(old, hidden)
            shutil.rmtree(hidden)


def whole(folder: Path) -> list[Path]:
    """All that are complete, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(
        each for each in folder.iterdir() if _NAME.fullmatch(each.name) and (each / PROGRESS).is_file()
    )


def latest(folder: Path) -> Path | None:
    """The newest that is complete."""
    found = whole(folder)
    return found[-1] if found else None


def state_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None
) -> dict[str, Any]:
    """What is saved, as it is now and where it is now."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(ignore_frozen_params=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    state = {"model": weights, "optimizer": moments}
    return state if average is None else state | {"average": average}


def load(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor] | None,
    team: Team,
) -> dict[str, Any]:
    """Fill model, optimizer and average from a checkpoint; returns its progress.

    Raises:
        IntegrityError: the checkpoint is damaged, or of another model.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    settings = [
        {key: value for key, value in each.items() if key != "params"} for each in optimizer.param_groups
    ]
    try:
        state = state_of(model, optimizer, average)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=not team.grouped)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)  # rates and the like are the configuration's, not the checkpoint's
        return json.loads((path / PROGRESS).read_text())
    except (Exception, CheckpointException) as error:  # torch reports damage and mismatch by many types
        raise IntegrityError(
            f"{path}: does not load ({one_line(error)}); if `model`, `lora`, `ema_decay` or "
            "frozen parts have changed, start a run in another `out` from this one's model; if the file is "
            "damaged, remove this checkpoint: the one before it is taken"
        ) from error


def random_state(team: Team) -> list[dict[str, str]]:
    """Of torch's generators, on every rank."""
    own = {"cpu": _text(torch.get_rng_state())}
    if team.device.type == "cuda":
        own["cuda"] = _text(torch.cuda.get_rng_state(team.device))
    return team.gather(own)


def restore_random(states: list[dict[str, str]], team: Team) -> None:
    """Set torch's generators; with another number of ranks than then, those that are new stay as they are."""
    if team.rank < len(states):
        own = states[team.rank]
        torch.set_rng_state(_bytes(own["cpu"]))
        if team.device.type == "cuda" and "cuda" in own:
            torch.cuda.set_rng_state(_bytes(own["cuda"]), team.device)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy in the CPU's memory, of this rank's shards."""
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    return BlockingAsyncStager().stage(state)
