"""The same builds as in `test_simulation`, into a bucket in memory whose requests fail, come late or twice.

    python -m tests.simulation --bucket 0 1000          # seeds; prints those that fail
    python -m tests.simulation --bucket --calls         # every request with every kind of fault

In `make soak`: each kind of fault once, and 1,000 seeds, or a share of them (tests/seeds.py).
"""

from __future__ import annotations

import logging
import re

import pytest

from paracaption.pipeline.corpus import sweep as sweeping
from paracaption.pipeline.io import buckets
from tests.seeds import some
from tests.simulation import bucket
from tests.simulation.bucket import REQUESTS, WRITES, BucketWorld
from tests.simulation.test_simulation import try_seeds
from tests.simulation.world import Simulation


@pytest.fixture(scope="module")
def simulation(tmp_path_factory):
    logging.disable(logging.WARNING)
    yield Simulation(tmp_path_factory.mktemp("simulation"), BucketWorld)
    logging.disable(logging.NOTSET)


@pytest.mark.soak
def test_builds_in_a_bucket_under_seeded_faults_end_as_if_nothing_had_been(simulation):
    try_seeds(simulation, range(8))


@pytest.mark.soak
@pytest.mark.timeout(36_000)
def test_many_seeds_in_a_bucket(simulation):
    try_seeds(simulation, some(range(1000, 2000)))


def test_the_same_seed_is_the_same_run_in_a_bucket(simulation):
    stories = []
    for _ in range(2):
        simulation.seeded(3)
        stories.append([re.sub(r"-[0-9a-f]{12}\b", "", told) for told in simulation.story])
    assert stories[0] == stories[1] and " at " in stories[0][0]


@pytest.mark.parametrize("kind", [*REQUESTS, *WRITES])
@pytest.mark.soak
def test_every_kind_of_fault_happens_in_a_bucket(simulation, kind):
    faults = [(where, fault) for where, fault in simulation.faults() if fault.kind == kind]
    for each in faults[7 :: max(1, len(faults) // 5)]:
        assert simulation.problem_of(*each) == ""
        if f"{kind} at " in simulation.story[0]:
            return
    pytest.fail(f"none of {len(faults)} faults happened")


def test_what_does_not_hold_in_a_bucket_is_noticed(simulation, monkeypatch):
    """A sweep that does not look what the log names deletes what was committed."""
    monkeypatch.setattr(sweeping, "_named", lambda _: set())
    monkeypatch.setattr(sweeping, "_named_since", lambda *_: set())
    assert simulation.problem_of("rebuild")


@pytest.mark.soak
def test_a_store_that_ignores_conditions_is_noticed(simulation, monkeypatch):
    """A record that comes late takes the place of the one that another driver has written meanwhile."""
    create = buckets._create

    def put(calls, client, key, data):
        if "/log/" not in key:
            return create(calls, client, key, data)
        calls.put(client, key, data)
        return True

    monkeypatch.setattr(buckets, "_create", put)
    monkeypatch.setattr(bucket, "_LATER", (170,))
    faults = [each for where, each in simulation.faults() if where == "fresh" and each.kind == "kill_stuck"]
    assert any("committed twice" in simulation.problem_of("fresh", each) for each in faults[20:])
