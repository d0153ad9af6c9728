"""How many of their seeds the long random tests of `make soak` try: $PARACAPTION_SEEDS, 1 for all of them."""

import os

SHARE = float(os.environ.get("PARACAPTION_SEEDS", "0.2"))


def some(seeds: range) -> range:
    """The first of the seeds, at least one."""
    return seeds[: max(1, round(len(seeds) * SHARE))]
