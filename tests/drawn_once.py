"""Pictures of equal statistics are drawn once in a run: three quarters of the time of a small build.

A process that a test starts draws its own, to the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from paracaption.pipeline.corpus import plots

if TYPE_CHECKING:
    from paracaption.schemas.summary import CorpusSummary

Draw = Callable[["CorpusSummary"], dict[str, bytes]]


def _once(draw: Draw) -> Draw:
    drawn: dict[bytes, dict[str, bytes]] = {}

    def draw_or_remember(summary: CorpusSummary) -> dict[str, bytes]:
        key = msgspec.json.encode(summary.subsets)
        if key not in drawn:
            drawn[key] = draw(summary)
        return dict(drawn[key])

    return draw_or_remember


def pytest_configure() -> None:
    """Before any test, also before those that put something else in its place."""
    plots.draw_plots = _once(plots.draw_plots)
