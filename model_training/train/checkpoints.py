"""Checkpoints of a training run: complete or absent, written while training goes on, for any number of ranks.

    OUT/checkpoints/step-00000500/       weights, optimizer and EMA, by torch's distributed checkpoint
    OUT/checkpoints/step-00000500/progress.json    step, loader, random numbers, configuration
    OUT/checkpoints/.step-00001000.partial/        being written, or left by a run that was killed

A folder gets its name when all of its files are on the disk. Frozen weights are not in it: they come from the
model that the run started from. Its files are pickles: resume from your own.
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

    from .distributed import DistributedGroup

PROGRESS = "progress.json"
_NAME = re.compile(r"step-(\d{8})")


class Checkpoints:
    """The checkpoints in a folder. All ranks call the same methods in the same order.

    Args:
        folder: lies on a file system that all ranks share.
        group: the ranks.
        keep: number of checkpoints that are kept.
        asynchronous: `save` returns when it has copied the state to memory. At most one checkpoint is being
            written at a time.
    """

    def __init__(self, folder: Path, group: DistributedGroup, keep: int = 3, asynchronous: bool = True):
        self.folder, self.group, self.keep, self.asynchronous = folder, group, keep, asynchronous
        self.process_group: dist.ProcessGroup | None = None
        if group.has_process_group:  # the writing thread's messages must not meet the trainer's
            made = dist.new_group(backend="gloo")
            assert isinstance(made, dist.ProcessGroup)
            self.process_group = made
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None
        if group.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob(".step-*.old.partial"):
                files.put_back(old, folder / old.name.removeprefix(".").removesuffix(".old.partial"))
            for partial in folder.glob(".step-*.partial"):
                shutil.rmtree(partial)
        group.barrier()

    def save(self, step: int, state: dict[str, Any], progress: dict[str, Any]) -> None:
        """Write a checkpoint, and remove the oldest one if there are more than `keep`.

        Args:
            step: the last step that is done.
            state: what `training_state` returns.
            progress: goes to progress.json as JSON; the same on all ranks.
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
        """Let the checkpoint that is being written be finished, whatever has happened to the training."""
        self.pool.shutdown()

    def _write(self, step: int, state: dict[str, Any], progress: dict[str, Any]) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        target, partial = self.folder / f"step-{step:08}", self.folder / f".step-{step:08}.partial"
        writing = nullcontext(partial)  # all ranks write into one folder, and rank 0 gives it its name
        if self.group.rank == 0:  # `replace`: a run resumed from an older checkpoint comes here again
            writing = files.write_folder_atomic(target, replace=True, temporary=partial)
        with warnings.catch_warnings(), writing:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            # Returns on rank 0 when every rank has written and synchronized its files.
            save(
                state,
                storage_writer=FileSystemWriter(partial),
                process_group=self.process_group,
                no_dist=self.process_group is None,
            )
            if self.group.rank == 0:
                (partial / PROGRESS).write_text(json.dumps({"step": step, **progress}))
        if self.group.rank == 0:
            self._prune()

    def _prune(self) -> None:
        for old in complete_checkpoints(self.folder)[: -self.keep]:
            # Renamed first, so that a killed removal leaves no folder that looks complete.
            hidden = old.with_name(f".{old.name}.partial")
            os.replace(old, hidden)
            shutil.rmtree(hidden)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(
        each for each in folder.iterdir() if _NAME.fullmatch(each.name) and (each / PROGRESS).is_file()
    )


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder; None if there is none."""
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def training_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor] | None
) -> dict[str, Any]:
    """The tensors of a checkpoint, as they are now: they are not copied."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(ignore_frozen_params=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    return state if ema is None else state | {"average": ema}


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: dict[str, Tensor] | None,
    group: DistributedGroup,
) -> dict[str, Any]:
    """Fill the model, the optimizer and the EMA from a checkpoint, in place.

    Returns:
        The checkpoint's progress.json.

    Raises:
        IntegrityError: the checkpoint is damaged, holds what could run code, or belongs to another model.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    from .checkpoint_files import CheckpointReader, TensorsAndNumbers

    configured = [
        {key: value for key, value in each.items() if key != "params"} for each in optimizer.param_groups
    ]
    try:
        state = training_state(model, optimizer, ema)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(
                state,
                storage_reader=CheckpointReader(path),
                planner=TensorsAndNumbers(),
                no_dist=not group.has_process_group,
            )
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
        for param_group, own in zip(optimizer.param_groups, configured, strict=True):
            param_group.update(own)  # rates and the like are the configuration's, not the checkpoint's
        return json.loads((path / PROGRESS).read_text())
    except (Exception, CheckpointException) as error:  # torch reports damage and mismatch by many types
        raise IntegrityError(
            f"{path}: does not load ({one_line(error)}); if `model`, `lora`, `ema_decay` or the frozen parts "
            "have changed, change them back, or train in another `out`; if the file is damaged, delete the "
            "folder of this checkpoint: the one before it is used"
        ) from error


def get_rng_states(group: DistributedGroup) -> list[dict[str, str]]:
    """The states of torch's random number generators on every rank, in base64."""
    own = {"cpu": _text(torch.get_rng_state())}
    if group.device.type == "cuda":
        own["cuda"] = _text(torch.cuda.get_rng_state(group.device))
    return group.all_gather(own)


def set_rng_states(states: list[dict[str, str]], group: DistributedGroup) -> None:
    """Set torch's random number generators of this rank.

    If there are more ranks now than when the states were taken, those of the new ranks stay as they are.
    """
    if group.rank < len(states):
        own = states[group.rank]
        torch.set_rng_state(_bytes(own["cpu"]))
        if group.device.type == "cuda" and "cuda" in own:
            torch.cuda.set_rng_state(_bytes(own["cuda"]), group.device)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy in the CPU's memory, of this rank's shards."""
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    return BlockingAsyncStager().stage(state)
