"""The libraries start at once: nothing heavy is imported before it is needed."""

import subprocess
import sys

HEAVY = {"torch", "ray", "vllm", "transformers", "cv2", "prefect", "pyarrow", "matplotlib"}


def test_the_libraries_import_nothing_heavy_and_few_modules():
    script = """
import sys
before = set(sys.modules)
import schemas, filters, pipeline
print(*set(sys.modules) - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert {"schemas", "filters", "pipeline"} <= imported
    assert not HEAVY & imported
    assert len(imported) < 30, sorted(imported)


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
