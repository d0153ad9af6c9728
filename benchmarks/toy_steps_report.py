"""The table and the plot of `benchmarks.toy_steps`: means over the seeds, with their spread."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Seeds = dict[int, dict[str, Any]]
"""The scores of each seed."""

_COLORS = {
    "schedule": "#999999",
    "threshold": "#cc79a7",
    "position thresholds": "#e69f00",
    "factor": "#0072b2",
}


def read_scores(folder: Path) -> dict[tuple[str, str], Seeds]:
    """What was measured, by the model's name and the way of decoding."""
    found: dict[tuple[str, str], Seeds] = defaultdict(dict)
    for path in sorted((folder / "scores").glob("*.json")):
        name, _, seed = path.stem.rpartition("-")
        for way, scores in json.loads(path.read_text()).items():
            found[name, way][int(seed)] = scores
    return found


def _spread(values: list[float], percent: bool) -> str:
    text = f"{mean(values):.1%}" if percent else f"{mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {100 * stdev(values):.1f}" if percent else f" ± {stdev(values):.2f}"
    return text


def kept_accuracy(found: dict[tuple[str, str], Seeds], name: str, way: str) -> list[float]:
    """Right captions as a share of those of the same seed's teacher that writes one token a forward."""
    reference = found["teacher", "one token"]
    return [
        scores["right"] / max(reference[seed]["right"], 1e-9)
        for seed, scores in found[name, way].items()
        if seed in reference
    ]


def table(found: dict[tuple[str, str], Seeds]) -> str:
    """The table in Markdown: mean and standard deviation over the seeds."""
    lines = [
        "| model | decoding | seeds | tokens a forward | right | of one token's | tangled right | "
        "contradictory | malformed | untrue |",
        "| --- | --- |" + " ---: |" * 8,
    ]
    for (name, way), seeds in found.items():
        every = list(seeds.values())
        shares = ("right_tangled", "contradictory", "malformed", "untrue")
        cells = [
            str(len(every)),
            _spread([each["tokens_per_forward"] for each in every], percent=False),
            _spread([each["right"] for each in every], percent=True),
            _spread(kept_accuracy(found, name, way), percent=True),
            *(_spread([each[share] for each in every], percent=True) for share in shares),
        ]
        lines.append(f"| {name} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[tuple[str, str], Seeds], path: Path) -> None:
    """The plot of teacher and student: right captions as a share of one token's, by tokens a forward."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    lines: dict[tuple[str, str], list[tuple[float, ...]]] = defaultdict(list)
    for (name, way), seeds in found.items():
        kept = kept_accuracy(found, name, way)
        speed = [each["tokens_per_forward"] for each in seeds.values()]
        point = (mean(speed), mean(kept), *(stdev(each) if len(each) > 1 else 0.0 for each in (speed, kept)))
        lines[name, way.rpartition(" ")[0]].append(point)
    for (name, kind), points in lines.items():
        if kind not in _COLORS or name not in ("teacher", "student"):
            continue
        x, y, dx, dy = zip(*sorted(points), strict=True)
        style = "--" if name == "teacher" else "-"
        axes.errorbar(
            x, y, dy, dx, style, marker="o", color=_COLORS[kind], capsize=2, lw=1.2, label=f"{name}, {kind}"
        )
    axes.axhline(0.98, color="black", lw=0.8, ls=":")
    axes.axvline(8, color="black", lw=0.8, ls=":")
    axes.set_xscale("log", base=2, subs=[1])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens a forward")
    axes.set_ylabel("right captions, of the teacher's\nwith one token a forward")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(folder: Path) -> str:
    """Draw the plot into the folder, and return the table."""
    found = read_scores(folder)
    draw(found, folder / "toy-steps.png")
    return table(found)
