"""How many requests a corpus in a bucket costs for each unit: each is paid for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from paracaption.pipeline.corpus import log
from paracaption.pipeline.corpus.copy import copy
from paracaption.pipeline.corpus.verify import verify
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.explorer.report import write_report
from paracaption.pipeline.io import scratch
from tests.building import config_of
from tests.object_server import ObjectServer, serving
from tests.synthetic import write_coconut

FEW, MANY = 4, 12
"""Units of one image, of which each has two model stages with evidence."""


class Requests:
    """What was asked for each thing that was done, with few units and with many."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, int], Counter[str]] = {}

    def note(self, server: ObjectServer, name: str, units: int, do: Callable[[], Any]) -> None:
        """Do it as a process of its own would, which remembers nothing."""
        log._SEEN.clear()
        log._RECENT.clear()
        server.forget_requests()
        do()
        self.found[name, units] = Counter(server.counts()["requests"])

    def per_unit(self, name: str, operation: str) -> float:
        """The requests that each further unit costs."""
        more = self.found[name, MANY][operation] - self.found[name, FEW][operation]
        return more / (MANY - FEW)


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    found, patch = Requests(), pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("requests")
    patch.setenv(scratch.VARIABLE, str(folder / "scratch"))
    patch.setattr(log, "_RECENT_S", 3600.0)  # a busy machine does not look at the log once a second
    for units in (FEW, MANY):
        with serving() as server:
            for name, value in server.environment.items():
                patch.setenv(name, value)
            out, again = "s3://corpus/one", "s3://corpus/two"
            beside = folder / str(units)
            source = write_coconut(beside / "source", units, 2)
            config = config_of(out, beside=beside, coconut=source, images_per_shard=1)

            def build(config=config) -> None:
                driver.build(config, LocalEngine())

            found.note(server, "build", units, build)
            found.note(server, "finished", units, build)
            found.note(server, "verify", units, lambda out=out: verify(out))
            found.note(server, "report", units, lambda out=out: write_report(out, folder / "report.html"))
            found.note(server, "copy", units, lambda out=out, again=again: copy(out, again))
            found.note(server, "copy again", units, lambda out=out, again=again: copy(out, again))
    patch.undo()
    return found


MOST = {
    # Evidence of two stages, shard, ledger and manifest are written, and looked at before they are committed.
    # Read are what is known of the three stages, and for the index ledger and manifest.
    "build": {"PutObject": 5.3, "GetObject": 7.5, "HeadObject": 6.5, "ListObjectsV2": 0.2},
    "finished": {"GetObject": 0.2, "HeadObject": 0.2, "ListObjectsV2": 0.0, "PutObject": 0.0},
    "verify": {"GetObject": 6.3, "HeadObject": 0.2, "ListObjectsV2": 0.2, "PutObject": 0.0},
    "report": {"GetObject": 3.3, "HeadObject": 0.2, "ListObjectsV2": 0.2, "PutObject": 0.0},
    "copy": {"GetObject": 5.3, "HeadObject": 5.3, "PutObject": 5.3, "ListObjectsV2": 0.2},
    # Evidence that was written in the second in which it was copied may be newer, so it is copied again.
    "copy again": {"GetObject": 2.2, "HeadObject": 2.2, "PutObject": 2.2, "ListObjectsV2": 0.2},
}
"""The most requests for each further unit; the records of the log, one in five seconds, are the fractions."""


@pytest.mark.parametrize("name", MOST)
@pytest.mark.soak
def test_each_unit_costs_so_many_requests_and_no_more(name, requests):
    found = {operation: requests.per_unit(name, operation) for operation in MOST[name]}
    wrong = {each: found[each] for each in found if found[each] > MOST[name][each]}
    assert not wrong, f"{found}"
    known = {*MOST[name], "DeleteObjects"}
    assert set(requests.found[name, MANY]) <= known | {"DeleteObject"}


def test_what_costs_nothing_for_a_unit_costs_little_at_all(requests):
    assert requests.found["finished", MANY].total() <= 60
    assert requests.found["copy again", MANY].total() <= 60 + 6 * MANY
