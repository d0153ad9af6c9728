"""How long a build takes and on how many GPUs, estimated from a pilot: see docs/estimate.md.

`rates` measures what a region costs in each stage of a pilot, `allocate` shares out GPUs and cores among the
pools, `predict` turns both into hours, and `report` prints them.
"""
