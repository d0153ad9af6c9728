import logging

import msgspec
import pytest

from paracaption.pipeline.executor.in_flight import InFlight
from paracaption.schemas.errors import StageFailed
from tests.pipeline.executor.images import die, images


def keys(batches) -> list[list[str]]:
    return [[each.key for each in batch] for batch in batches]


def test_without_a_note_images_run_in_full_batches_in_order(tmp_path):
    with InFlight(tmp_path, "u", 3) as in_flight:
        assert keys(in_flight.split(images(5), 2)) == [["i0", "i1"], ["i2", "i3"], ["i4"]]


def test_images_in_flight_at_a_death_run_alone_and_last_and_no_death_counts_yet(tmp_path):
    die(tmp_path, ["i1", "i2"], attempts=1)
    with InFlight(tmp_path, "u", 1) as in_flight:
        assert keys(in_flight.split(images(4), 4)) == [["i0", "i3"], ["i1"], ["i2"]]
        assert not in_flight.is_poison("i1")


def test_after_each_death_in_a_batch_the_next_batches_are_half_as_large(tmp_path):
    die(tmp_path, ["i0", "i1", "i2", "i3"])
    with InFlight(tmp_path, "u", 3) as in_flight:
        assert [len(batch) for batch in in_flight.split(images(12), 4)] == [2, 2, 2, 2, 1, 1, 1, 1]
    die(tmp_path, ["i0", "i1", "i2", "i3"])
    die(tmp_path, ["i4", "i5"])
    with InFlight(tmp_path, "u", 3) as in_flight, in_flight.batch(["i6"]):
        assert {len(batch) for batch in in_flight.split(images(12), 4)} == {1}
        assert msgspec.json.decode((tmp_path / "u.json").read_bytes())["halvings"] == 2


def test_an_image_is_poison_after_its_deaths_alone_and_only_then(tmp_path):
    die(tmp_path, ["i1"])
    with InFlight(tmp_path, "u", 2) as in_flight:
        assert not in_flight.is_poison("i1")
    die(tmp_path, ["i1"])
    die(tmp_path, ["i1"])
    with InFlight(tmp_path, "u", 2) as in_flight:
        assert in_flight.is_poison("i1") and not in_flight.is_poison("i0")
        assert in_flight.crash_detail("i1") == "the worker died 2 times while it had only this image"


def test_deaths_of_one_image_are_remembered_while_others_work(tmp_path):
    die(tmp_path, ["i1"])
    with InFlight(tmp_path, "u", 2) as in_flight, in_flight.batch(["i0"]):
        note = msgspec.json.decode((tmp_path / "u.json").read_bytes())
        assert note == {"deaths": {"i1": 1}, "working": ["i0"], "halvings": 0}


@pytest.mark.parametrize(
    "torn",
    [b"", b'{"deaths": {"i1"', b"[1]", b'{"deaths": 3}', b'{"working": [1]}', b'{"deaths": {"\xff": 1}}'],
)
def test_a_torn_note_counts_as_none(tmp_path, torn):
    (tmp_path / "u.json").write_bytes(torn)
    with InFlight(tmp_path, "u", 1) as in_flight:
        assert keys(in_flight.split(images(2), 2)) == [["i0", "i1"]]


def test_a_unit_that_is_through_leaves_no_note_and_one_that_failed_does(tmp_path):
    with InFlight(tmp_path, "u", 1) as in_flight, in_flight.batch(["i0"]):
        assert (tmp_path / "u.json").exists()
    assert not (tmp_path / "u.json").exists()
    with pytest.raises(StageFailed), InFlight(tmp_path, "u", 1) as in_flight, in_flight.batch(["i0"]):
        raise StageFailed("over")
    assert msgspec.json.decode((tmp_path / "u.json").read_bytes())["working"] == []


def test_a_disk_that_takes_no_notes_is_one_warning_and_the_unit_goes_on(tmp_path, caplog):
    (tmp_path / "u.json").mkdir()  # neither readable nor writable nor removable as a file
    with caplog.at_level(logging.WARNING), InFlight(tmp_path, "u", 1) as in_flight:
        for batch in in_flight.split(images(4), 1):
            with in_flight.batch([each.key for each in batch]):
                pass
    assert len([line for line in caplog.messages if "cannot be identified" in line]) == 1
