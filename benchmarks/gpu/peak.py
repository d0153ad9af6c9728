"""What the device gives: a large matrix product and a large copy, beside what its datasheet says."""

from __future__ import annotations

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.rows import Measured, Rows


def run(rows: Rows, machine: Machine) -> None:
    """The rates that `open_machine` measured."""
    for number, (name, unit, scale) in enumerate((("product", "TFLOP/s", 1e12), ("copy", "GB/s", 1e9))):
        rows.measure(name, lambda n=number, u=unit, s=scale: _row(machine, n, u, s))


def _row(machine: Machine, number: int, unit: str, scale: float) -> Measured:
    found = machine.measured[number] / scale
    published = machine.published[number] / scale if machine.published else None
    roofline = {"bound": "compute" if number == 0 else "memory", "measured_share": 1.0}
    roofline["share"] = found / published if published else 1.0
    return Measured(f"{found:,.4g} {unit}", {"rate": found, "unit": unit, "published": published}, roofline)
