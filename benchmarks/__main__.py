"""Runs every measurement in a process of its own and prints what it prints."""

import subprocess
import sys

NAMES = ("stream", "mask_filters", "planning", "memory", "estimate", "segmenters", "gar", "judge")
NAMES += ("decoder", "decoder_memory", "loader", "explorer", "startup", "damage", "mixed")
NAMES += ("answers --steps 4", "photos")

if __name__ == "__main__":
    status = 0
    for name in sys.argv[1:] or NAMES:
        print(f"== {name}", flush=True)
        module, *options = name.split()
        command = [sys.executable, "-m", f"benchmarks.{module}", *options]
        status |= subprocess.run(command, check=False).returncode
    raise SystemExit(status)
