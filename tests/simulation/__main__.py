"""Runs of the simulation without pytest; see `test_simulation`."""

import logging
import sys
import tempfile
import time
from pathlib import Path

from tests.simulation.bucket import BucketWorld
from tests.simulation.world import Simulation, World


def main() -> None:
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        given = [each for each in sys.argv[1:] if each != "--bucket"]
        kind = World if given == sys.argv[1:] else BucketWorld
        simulation, began = Simulation(Path(folder), kind), time.monotonic()
        if given == ["--calls"]:
            runs = simulation.faults()
            found = ((f"{where} {fault}", simulation.problem_of(where, fault)) for where, fault in runs)
        else:
            runs = range(*map(int, given))
            found = ((f"seed {seed}", simulation.problem_of_seed(seed)) for seed in runs)
        bad = 0
        for name, problem in found:
            if problem:
                bad += 1
                sys.stdout.write(f"{name}: {problem}\n")
                sys.stdout.flush()
        sys.stdout.write(f"{len(runs):,} runs, {bad} bad, {time.monotonic() - began:.0f} s\n")
    sys.exit(bad > 0)


main()
