"""Loss curves: a picture of the loss of runs, drawn from their metrics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...pipeline.io import files
from ...pipeline.io.figure import draw_figure
from . import metrics

_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
"""Okabe and Ito's, which color-blind eyes tell apart."""


def draw_loss_curves(runs: Mapping[str, Path], path: Path) -> None:
    """Draw the loss of each run. If there is only one, draw its cross-entropy by noise level below.

    Args:
        runs: output folder of each run by its name in the legend.
        path: where the PNG is written.
    """
    records = {name: metrics.read_metrics(folder) for name, folder in runs.items()}

    def loss(axes: Any) -> None:
        for (name, lines), color in zip(records.items(), _COLORS * len(records), strict=False):
            axes.plot(*_smooth(lines, "loss"), color=color, label=name, linewidth=1.4)

    def levels(axes: Any) -> None:
        [lines] = records.values()
        names = sorted({key for line in lines for key in line if key.startswith("ce_")})
        for name, color in zip(names, _COLORS, strict=False):
            label = f"up to {float(name[3:]):.0%} masked"
            axes.plot(*_smooth(lines, name), color=color, label=label, linewidth=1.4)

    panels = {"Loss": loss}
    if len(records) == 1:
        panels["Cross-entropy of masked tokens, in nats"] = levels
    with files.write_atomic(path) as file:
        file.write(draw_figure({title: _framed(panel) for title, panel in panels.items()}, [3.0] * 2))


def _framed(panel: Any) -> Any:
    def drawn(axes: Any) -> None:
        panel(axes)
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.grid(True, color="#EEEEEE")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)

    return drawn


def _smooth(records: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A metric over the steps that have it: steps, and means over about a hundredth of the run."""
    pairs = [(line["step"], line[name]) for line in records if isinstance(line.get(name), int | float)]
    if not pairs:
        return np.zeros(0), np.zeros(0)
    steps, values = np.array(pairs, np.float64).T
    width = max(1, len(values) // 100)
    sums = np.convolve(values, np.ones(width), "valid") / width
    return steps[width - 1 :], sums
