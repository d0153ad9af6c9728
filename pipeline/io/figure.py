"""How plots look, wherever they are drawn: the dataset card's, the training curves, the explorer's charts."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

KEPT = "#0072B2"
DROPPED = "#E69F00"
MOVED = "#222222"  # would change sides: its lightness alone tells it apart
DECLARED = "#BBBBBB"
INK = "#333333"
QUIET = "#777777"

_STYLE: Any = {
    "figure.dpi": 120,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.axisbelow": True,
    "svg.hashsalt": "paracaption",
}


def draw_figure(panels: Mapping[str, Callable[[Any], None]], heights: Sequence[float]) -> bytes:
    """Draw panels below each other, and return them as a PNG. Equal panels give equal bytes.

    Args:
        panels: by a panel's title, the function that draws on its Matplotlib axes.
        heights: heights of the panels in inches, at least as many as there are panels.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Matplotlib replaces fonts that are missing; nobody needs to read about it.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    heights = heights[: len(panels)]
    with matplotlib.rc_context(_STYLE):
        made = Figure(figsize=(8, sum(heights)), layout="constrained")
        FigureCanvasAgg(made)
        grid = made.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
        for axes, (title, draw) in zip(grid[:, 0], panels.items(), strict=True):
            axes.set_title(title)
            draw(axes)
        made.get_layout_engine().set(h_pad=0.15, w_pad=0.15)  # type: ignore[union-attr]
        buffer = io.BytesIO()
        made.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()
