"""One part in its own process: `python -m benchmarks.gpu.child NAME ...`, started by `__main__`."""

from __future__ import annotations

import time

START = time.monotonic()
"""Before torch is imported, which takes seconds of the part's time."""

import argparse  # noqa: E402
import importlib  # noqa: E402
from pathlib import Path  # noqa: E402

from benchmarks.gpu.rows import Rows  # noqa: E402


def main() -> None:
    """Run the part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--limit-s", type=float, required=True)
    args = parser.parse_args()
    import torch

    from benchmarks.gpu.machine import open_machine

    rows = Rows(args.out / f"{args.part}.jsonl", args.limit_s, START)
    machine = open_machine(args.out, args.device, args.size == "tiny")
    if machine.tiny and machine.device.type == "cpu":
        torch.set_num_threads(1)  # small products: more threads would only wait for each other
    module = importlib.import_module(f"benchmarks.gpu.{args.part.replace('-', '_')}")
    module.run(rows, machine)


if __name__ == "__main__":
    main()
