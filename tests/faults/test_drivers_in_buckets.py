"""Drivers against each other in a bucket that fails; see `tests.duels`.

    PARACAPTION_DUELS=180 PARACAPTION_DUELS_FILE=duels.jsonl python -m pytest -m soak -k local \
        tests/faults/test_drivers_in_buckets.py

PARACAPTION_RAY_DUELS is the number of rounds through Ray, PARACAPTION_FIRST_DUEL the first seed.
"""

from __future__ import annotations

import os

import pytest

from tests.duels import Sources, play, rounds

pytestmark = [pytest.mark.soak, pytest.mark.timeout(360_000)]

RESULTS = os.environ.get("PARACAPTION_DUELS_FILE", "")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return Sources(tmp_path_factory.mktemp("sources"))


def fail_together(problems: list[str], number: int) -> None:
    assert not problems, f"{len(problems)} of {number} rounds:\n" + "\n\n".join(problems[:5])


def test_rounds_of_local_drivers(tmp_path, sources):
    seeds = list(rounds(5, "PARACAPTION_DUELS"))
    fail_together([each for seed in seeds if (each := play(tmp_path, sources, seed, RESULTS))], len(seeds))


def test_rounds_of_drivers_on_ray(tmp_path, sources):
    seeds = list(rounds(1, "PARACAPTION_RAY_DUELS"))
    problems = [each for seed in seeds if (each := play(tmp_path, sources, seed, RESULTS, on_ray=True))]
    fail_together(problems, len(seeds))
