"""Builds in memory under faults: nothing committed is lost, and the end is that of an undisturbed build.

    python -m tests.simulation 0 10000          # seeds; prints those that fail
    python -m tests.simulation --calls          # every call with every kind of fault

In `make soak`: every call with all kinds of fault, and 2,000 seeds, or a share of them (tests/seeds.py).
"""

from __future__ import annotations

import logging
import re

import pytest

from tests.seeds import some
from tests.simulation.world import KINDS, Simulation


@pytest.fixture(scope="module")
def simulation(tmp_path_factory):
    logging.disable(logging.WARNING)
    yield Simulation(tmp_path_factory.mktemp("simulation"))
    logging.disable(logging.NOTSET)


def fail_together(problems: list[str], runs: int) -> None:
    assert not problems, f"{len(problems)} of {runs} runs:\n" + "\n".join(problems[:5])


def try_seeds(simulation: Simulation, seeds: range) -> None:
    fail_together([problem for seed in seeds if (problem := simulation.problem_of_seed(seed))], len(seeds))


def try_calls(simulation: Simulation, every: int) -> None:
    """Every n-th of all faults that can happen to a fresh build, a rebuild, a growth and a removal."""
    faults = simulation.faults()[::every]
    fail_together([problem for each in faults if (problem := simulation.problem_of(*each))], len(faults))


@pytest.mark.soak
def test_builds_under_seeded_faults_end_as_if_nothing_had_been(simulation):
    try_seeds(simulation, range(15))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_seeds(simulation):
    try_seeds(simulation, some(range(1000, 3000)))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_fault_at_every_call(simulation):
    try_calls(simulation, 1)


def test_the_same_seed_is_the_same_run(simulation):
    stories = []
    for _ in range(2):
        simulation.seeded(3)
        stories.append([re.sub(r"-[0-9a-f]{12}\b", "", told) for told in simulation.story])
    assert stories[0] == stories[1] and " at " in stories[0][0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.soak(keep=4)
def test_every_kind_of_fault_happens(simulation, kind):
    faults = [(where, fault) for where, fault in simulation.faults() if fault.kind == kind]
    for each in faults[:: max(1, len(faults) // 5)]:
        assert simulation.problem_of(*each) == ""
        if f"{kind} at " in simulation.story[0]:
            return
    pytest.fail(f"none of {len(faults)} faults happened")


@pytest.mark.soak
def test_what_does_not_hold_is_noticed(simulation, monkeypatch):
    """A driver that names files in a record before they are on the disk loses them at a power cut."""
    from paracaption.pipeline.io import store

    monkeypatch.setattr(store._Named, "close", store.io.BufferedWriter.close)
    faults = [
        (where, fault) for where, fault in simulation.faults() if where == "fresh" and fault.kind == "kill"
    ]
    from_the_first_commit_on = faults[::7][len(faults) // 16 :]
    assert any(simulation.problem_of(*each) for each in from_the_first_commit_on)
