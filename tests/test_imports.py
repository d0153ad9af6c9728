"""The libraries start at once: nothing heavy is imported before it is needed."""

import json
import statistics
import subprocess
import sys

SCRIPT = """
import json, sys, time
start = time.perf_counter()
import schemas, filters, pipeline
print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))
"""
HEAVY = {"torch", "ray", "vllm", "transformers", "cv2", "prefect", "pyarrow", "matplotlib"}


def test_the_libraries_are_imported_in_half_a_second_without_torch_or_ray():
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    assert not HEAVY & set(runs[0][1])
    assert statistics.median(seconds for seconds, _ in runs) < 0.5


def test_every_module_but_the_networks_themselves_leaves_torch_and_ray_alone():
    script = """
import importlib, pkgutil, sys
networks = {f"pipeline.models.gar.{name}" for name in ("encoder", "replay", "vision")}  # torch modules
for package in ("schemas", "filters", "pipeline"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if module.name not in networks:
            importlib.import_module(module.name)
print(*sorted({"torch", "ray", "vllm", "transformers", "cv2", "prefect"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_command_lines_help_needs_neither_ray_nor_prefect():
    script = """
import sys
from typer.testing import CliRunner
from flows.cli import app
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
print(*sorted({"torch", "ray", "prefect", "cv2"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
