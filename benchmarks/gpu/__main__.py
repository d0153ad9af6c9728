"""Everything that waits for a GPU, in under 8 minutes on one H200: `python -m benchmarks.gpu`.

Each part runs alone in a subprocess with a time limit; weights are random and made on the device; nothing is
fetched. The report, OUT/report.md and OUT/report.json, is written anew after each part, and a part that is
killed keeps the rows it has. A part whose packages are not installed is skipped, and the report names them.

    python -m benchmarks.gpu                             # all parts
    python -m benchmarks.gpu --list                      # the parts, and what each needs
    python -m benchmarks.gpu --parts decode,batch
    python -m benchmarks.gpu --device cpu --size tiny    # a dry run; its numbers mean nothing
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import textwrap
import time
from pathlib import Path

from benchmarks.gpu import parts, report, runner
from benchmarks.gpu.parts import Part
from benchmarks.gpu.runner import Settings
from paracaption.schemas.errors import ConfigError

WIDTH = 80


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; 1 if one failed or ran out of time, 2 for a wrong argument."""
    args = _parser().parse_args(arguments)
    try:
        chosen = parts.chosen([name.strip() for name in args.parts.split(",") if name.strip()])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if args.list:
        _list(chosen)
        return 0
    if why := lacks_gpu(args.device, args.size):
        print(why, file=sys.stderr)
        return 2
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(out, args.device, args.size)
    return run(chosen, settings, args.seconds)


def lacks_gpu(device: str, size: str) -> str:
    """What to do if a GPU is wanted, or published sizes by themselves, and torch sees none; else ""."""
    if importlib.util.find_spec("torch") is None or device == "cpu" or (device == "auto" and size == "tiny"):
        return ""
    import torch

    if torch.cuda.is_available():
        return ""
    return (
        "torch sees no GPU here; run it on a machine with one, or dry with --device cpu --size tiny, whose "
        "numbers mean nothing"
    )


def run(chosen: list[Part], settings: Settings, total_s: float = parts.TOTAL_S) -> int:
    """Run parts one after the other, and write the report after each; 1 if one failed."""
    start = time.monotonic()
    lacking = {part.name: parts.missing(part) for part in chosen}
    able = [part for part in chosen if not lacking[part.name]]
    results: list[runner.Result] = []
    with runner.caches() as environment:
        for part in chosen:
            print(f"{part.name}: {part.title}", flush=True)
            if lacking[part.name]:
                found = runner.skipped(part, lacking[part.name])
            else:
                waiting = able[able.index(part) :]
                limit_s = parts.limit_s(waiting, time.monotonic() - start, total_s)
                found = runner.run(part, settings, limit_s, environment, on_row=_show)
            results.append(found)
            report.write(settings, results, time.monotonic() - start)
            why = f": {found.why}" if found.why else f" in {found.seconds:.0f} s"
            _print(f"{found.status}{why}")
    print(settings.out / "report.md")
    return int(any(found.status in (runner.FAILED, runner.KILLED) for found in results))


def _show(row: dict) -> None:
    if row["status"] != "done":
        _print(f"{row['row']}: {row['status']}: {row['why']}")
        return
    share = row["roofline"].get("share")
    _print(f"{row['row']}: {row['headline']}" + (f"; {share:.0%} of the roofline" if share else ""))


def _print(text: str) -> None:
    print(textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="    "), flush=True)


def _list(chosen: list[Part]) -> None:
    for part in chosen:
        print(f"{part.name:9} {part.seconds:3.0f} s  {part.title}")
        lacking = parts.missing(part)
        _print(f"needs {', '.join(part.needs)}" + (f"; missing: {', '.join(lacking)}" if lacking else ""))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", default="", help="names with commas between them (default: all)")
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    parser.add_argument("--out", default="out/gpu", help="folder of the report (default: out/gpu)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument(
        "--seconds", type=float, default=parts.TOTAL_S, help="of all parts together (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
