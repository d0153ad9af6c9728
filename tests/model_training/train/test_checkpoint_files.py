"""A checkpoint's folder may be a stranger's: its pickles are read as data, and nothing leads out of it."""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from paracaption.model_training.train import checkpoint_files, checkpoints
from paracaption.schemas.errors import IntegrityError

OLD = Path(__file__).resolve().parents[2] / "formats/v0_1/run/checkpoints/step-00000004"


class Runs:
    """A pickle that leaves a file when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return shutil.copytree(OLD, tmp_path / "step-00000004")


def index_of(checkpoint: Path) -> Metadata:
    return checkpoint_files.CheckpointReader(checkpoint).read_metadata()


def rewrite(checkpoint: Path, change: Callable[[Metadata], Any]) -> None:
    found = index_of(checkpoint)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(change(found) or found))


def load(checkpoint: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    group: Any = SimpleNamespace(has_process_group=False)
    checkpoints.load_checkpoint(checkpoint, model, optimizer, None, group)


def saved(folder: Path) -> Path:
    """A checkpoint of a small model, as a run writes it."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    state = checkpoints.training_state(model, optimizer, None)
    save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    (folder / checkpoints.PROGRESS).write_text('{"step": 4}')
    return folder


def test_the_index_of_an_old_checkpoint_is_read(checkpoint):
    found = index_of(checkpoint)
    assert any(name.startswith("model.") for name in found.state_dict_metadata)
    assert {str(each.relative_path) for each in found.storage_data.values()} == {"__0_0.distcp"}


def test_a_checkpoint_of_ours_loads(tmp_path):
    load(saved(tmp_path / "step-00000004"))


@pytest.mark.parametrize("where", ["alone", "inside"])
def test_an_index_that_would_run_code_is_refused_and_does_not_run_it(tmp_path, where):
    folder, mark = saved(tmp_path / "step-00000004"), tmp_path / "RAN"
    if where == "alone":
        (folder / ".metadata").write_bytes(pickle.dumps(Runs(mark)))
    else:
        rewrite(folder, lambda found: setattr(found, "planner_data", Runs(mark)))
    with pytest.raises(IntegrityError, match=r"step-00000004: does not load .*no checkpoint of ours has"):
        load(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(("os", "system"), ("builtins", "eval"), ("subprocess", "Popen"), ("torch", "load")),
        *(
            ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
            ("torch", "serialization.load"),
        ),
    ],
)
def test_an_index_names_only_what_an_index_has(tmp_path, module, name):
    folder = saved(tmp_path / "step-00000004")
    (folder / ".metadata").write_bytes(f"c{module}\n{name}\n(S'true'\ntR.".encode())
    with pytest.raises(IntegrityError, match="which no checkpoint of ours has"):
        load(folder)


@pytest.mark.parametrize("path", ["../elsewhere.distcp", "/etc/passwd", "a/b", ".."])
def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path, path):
    folder = saved(tmp_path / "step-00000004")

    def change(found: Metadata) -> None:
        first: MetadataIndex = next(iter(found.storage_data))
        found.storage_data[first].relative_path = path

    rewrite(folder, change)
    with pytest.raises(IntegrityError, match="no file next to it"):
        load(folder)


def test_a_link_in_the_place_of_a_file_is_refused(tmp_path):
    folder = saved(tmp_path / "step-00000004")
    (data,) = folder.glob("*.distcp")
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="no file next to it"):
        load(folder)


def test_a_value_that_would_run_code_is_refused_and_does_not_run_it(tmp_path):
    folder, mark = saved(tmp_path / "step-00000004"), tmp_path / "RAN"
    buffer = io.BytesIO()
    torch.save(Runs(mark), buffer)
    (data,) = folder.glob("*.distcp")
    start = data.stat().st_size
    with data.open("ab") as file:
        file.write(buffer.getvalue())

    def change(found: Metadata) -> None:
        lr = next(each for each in found.storage_data if each.fqn.endswith(".lr"))
        found.storage_data[lr].offset, found.storage_data[lr].length = start, len(buffer.getvalue())

    rewrite(folder, change)
    with pytest.raises(IntegrityError, match="does not load"):
        load(folder)
    assert not mark.exists()


@pytest.mark.parametrize("data", [b"", b"{}", b"\x80\x04N.", b"<html>", pickle.dumps([1])])
def test_a_damaged_index_is_named(tmp_path, data):
    folder = saved(tmp_path / "step-00000004")
    (folder / ".metadata").write_bytes(data)
    with pytest.raises(
        IntegrityError, match=r"step-00000004: does not load .*delete the folder of this checkpoint"
    ):
        load(folder)
