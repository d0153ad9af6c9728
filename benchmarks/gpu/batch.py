"""PerceptionDLM at the published 8B shapes: images decoded together. Model and floor are `decode`'s."""

from __future__ import annotations

from benchmarks.decoder import REGIONS
from benchmarks.gpu.decode import measure, open_model, options_of
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.rows import Rows


def run(rows: Rows, machine: Machine) -> None:
    """A row for each size of the batch, until one does not fit."""
    model = open_model(machine)
    options = options_of(machine, "exact")
    before_s = rows.left_s()
    for images in (1, 2) if machine.tiny else (1, 2, 4, 8, 16, 32):
        took_s = before_s - rows.left_s()
        before_s = rows.left_s()
        name = f"{images} image{'s' * (images > 1)}"
        if not rows.measure(
            name,
            lambda images=images: measure(model, machine, images, REGIONS, options),
            needs_s=max(5, 2 * took_s),
        ):
            break
