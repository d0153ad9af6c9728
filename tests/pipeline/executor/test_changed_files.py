"""Files that were changed in place are found on request, and models are asked about nothing else."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from paracaption.pipeline.corpus import verify
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.changed_files import note_changed_files
from paracaption.pipeline.io import failures
from paracaption.pipeline.sources.registry import complete
from paracaption.schemas.errors import ConfigError
from tests.building import calls, config_of
from tests.pipeline.corpus.test_growth import SIZE, finish, records
from tests.synthetic import jpeg, write_coconut


@pytest.fixture
def built(tmp_path):
    config = config_of(tmp_path / "out", coconut=write_coconut(tmp_path / "source", 6, 2, SIZE))
    finish(config)
    return config


def asked(tmp_path) -> int:
    return len(calls(tmp_path / "captioner.log"))


def test_without_a_change_nothing_is_noted(built, tmp_path):
    assert note_changed_files(built) == {}
    assert driver.is_finished(complete(built))


@pytest.mark.soak
def test_another_photo_and_another_label_map_are_found_and_only_they_are_asked_about(built, tmp_path):
    before, root = asked(tmp_path), tmp_path / "source"
    (root / "photos/000000000001.jpg").write_bytes(jpeg(np.full((*SIZE, 3), 77, np.uint8)))
    path = root / "labels/000000000004.png"
    labels = np.array(Image.open(path))
    (top, left), (to_top, to_left) = (np.argwhere(labels[:, :, 0] == each)[0] for each in (1, 0))
    labels[top, left], labels[to_top, to_left] = 0, (1, 0, 0)  # one pixel of a mask is elsewhere
    Image.fromarray(labels).save(path)
    found = note_changed_files(built)
    assert str(found["coconut"]) == (
        "2 images changed in the source (000000000001, 000000000004): 2 units are built again"
    )
    assert note_changed_files(built) == {}
    assert not driver.is_finished(complete(built))
    finish(built)
    assert asked(tmp_path) == before + 3  # both masks of the photo, and the mask that is another one
    assert verify.verify(tmp_path / "out").ok, verify.verify(tmp_path / "out").text()
    at_once = config_of(tmp_path / "at once", coconut=built.subsets["coconut"].sources[0])
    finish(at_once)
    assert records(tmp_path / "out") == records(at_once.out)
    assert note_changed_files(built) == {}


def test_files_that_are_away_are_no_change(built, tmp_path):
    shutil.rmtree(tmp_path / "source/photos")
    (tmp_path / "source/photos").mkdir()
    passed_by = list[str]()
    assert note_changed_files(built, unread=passed_by.append) == {}
    assert passed_by == [f"coconut/{number:012d}" for number in range(6)]


@pytest.mark.parametrize("folder", ["labels", "photos"])
def test_a_folder_that_is_away_is_known_at_once(built, tmp_path, folder, monkeypatch):
    shutil.rmtree(tmp_path / "source" / folder)
    waits = built.model_copy(update={"failures": built.failures.model_copy(update={"read_retry_s": 60})})
    monkeypatch.setattr(failures.RETRYING, "_sleep", lambda _: pytest.fail("it is waited for"))
    with pytest.raises(ConfigError, match=f"{folder}: .*{folder}"):
        note_changed_files(waits)
