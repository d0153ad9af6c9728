"""PerceptionDLM at the published 8B shapes: images decoded together. Model and floor are `decode`'s."""

from __future__ import annotations

from benchmarks.decoder import REGIONS
from benchmarks.gpu.decode import measure, open_model, options_of
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.rows import Rows


def run(rows: Rows, machine: Machine) -> None:
    """A row for each size of the batch, until one does not fit; then one with the other kernel."""
    model = open_model(machine)
    options = options_of(machine, "exact")

    def row(images: int, kernel: str, needs_s: float) -> bool:
        name = f"{images} image{'s' * (images > 1)}, {kernel}"
        return rows.measure(
            name, lambda: measure(model, machine, images, REGIONS, options, kernel), needs_s=needs_s
        )

    before_s = rows.left_s()
    for images in (1, 2) if machine.tiny else (1, 2, 4, 8, 16, 32):
        took_s = before_s - rows.left_s()
        before_s = rows.left_s()
        if not row(images, "sdpa", needs_s=max(5, 2 * took_s)):
            break
    for images in (1,) if machine.tiny else (1, 8, 32):
        if not row(images, "flex_attention", needs_s=10):
            break
