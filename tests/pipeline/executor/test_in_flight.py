import logging

import msgspec
import pytest

from paracaption.pipeline.executor.in_flight import InFlight
from paracaption.pipeline.io.location import locate
from paracaption.pipeline.io.store import store_of
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


# Nodes that share a bucket and no folder.


def test_a_death_is_known_on_another_node_once_a_worker_of_its_own_node_has_found_it(tmp_path, memory_out):
    journal = locate(memory_out) / "coconut" / "journal" / "caption"
    die(tmp_path / "a", ["i0", "i1"], shared=journal)
    with InFlight(tmp_path / "b", "u", 2, journal) as in_flight:
        assert in_flight.deaths == {}  # so this node may lose one worker, too
    with pytest.raises(StageFailed), InFlight(tmp_path / "a", "u", 2, journal) as in_flight:
        assert in_flight.deaths == {"i0": 0, "i1": 0}
        raise StageFailed("over")
    with InFlight(tmp_path / "b", "u", 2, journal) as in_flight:
        assert keys(in_flight.split(images(3), 2)) == [["i2"], ["i0"], ["i1"]]


def test_an_image_that_kills_workers_on_two_nodes_in_turn_costs_one_crash_more(tmp_path, memory_out):
    """Three deaths alone are the limit, and one in company goes before them on each node."""
    journal = locate(memory_out) / "coconut" / "journal" / "caption"
    crashes, node = 0, "a"
    while True:
        in_flight = InFlight(tmp_path / node, "u", 3, journal).__enter__()
        if in_flight.is_poison("i0"):
            break
        (batch, *_) = [batch for batch in in_flight.split(images(2), 2) if "i0" in [i.key for i in batch]]
        with in_flight.batch([image.key for image in batch]):
            note = in_flight.path.read_bytes()
        in_flight.path.write_bytes(note)
        crashes, node = crashes + 1, "b" if node == "a" else "a"
    assert crashes <= 1 + 3 + 1 + 1  # the last one is not yet known to the other node
    in_flight.__exit__(None)
    assert store_of(memory_out).list(str(journal)) == []


def test_a_death_is_counted_once_where_the_bucket_has_it_already(tmp_path, memory_out):
    journal = locate(memory_out) / "coconut" / "journal" / "caption"
    die(tmp_path, ["i0"], shared=journal)
    for _ in range(3):
        in_flight = InFlight(tmp_path, "u", 3, journal).__enter__()
        assert in_flight.deaths == {"i0": 1}


@pytest.mark.soak
def test_a_bucket_that_does_not_answer_takes_no_note_and_the_unit_goes_on(tmp_path, faulty_s3, caplog):
    journal = locate("s3://corpus/out") / "coconut" / "journal" / "caption"
    die(tmp_path, ["i0"])
    faulty_s3.fail("503", count=None)
    with caplog.at_level(logging.WARNING), InFlight(tmp_path, "u", 3, journal) as in_flight:
        assert in_flight.deaths == {"i0": 1}
    assert "is ignored" in caplog.text and "cannot be identified" in caplog.text
    assert not (tmp_path / "u.json").exists()
