"""The libraries start at once: nothing heavy is imported before it is needed."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "ray", "vllm", "transformers", "cv2", "prefect", "pyarrow", "matplotlib"}


def test_the_libraries_import_nothing_heavy_and_few_modules():
    script = """
import sys
from pathlib import Path
before = set(sys.modules)
import paracaption.schemas, paracaption.filters, paracaption.pipeline
print(*set(sys.modules) - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert {"paracaption.schemas", "paracaption.filters", "paracaption.pipeline"} <= imported
    assert not HEAVY & imported
    assert len(imported) < 30, sorted(imported)


@pytest.mark.soak
def test_a_file_is_loaded_under_one_name():
    """`paracaption/pipeline` is a link to `pipeline`: loaded under both names, a class would exist twice."""
    script = """
import pkgutil, importlib, sys
from pathlib import Path
import paracaption
for module in pkgutil.walk_packages(paracaption.__path__, "paracaption."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
names = {}
for name, module in list(sys.modules.items()):
    if getattr(module, "__file__", None):
        names.setdefault(Path(module.__file__).resolve(), set()).add(name)
ours = {file: found for file, found in names.items() if any(name.startswith("paracaption") for name in found)}
assert len(ours) > 150, len(ours)
print(*[f"{file}: {sorted(found)}" for file, found in ours.items() if len(found) > 1], sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_module_but_the_networks_themselves_leaves_torch_and_ray_alone():
    script = """
import importlib, pkgutil, sys
networks = {f"paracaption.pipeline.models.gar.{name}" for name in ("encoder", "roi_align", "vision")}  # torch
for package in ("paracaption.schemas", "paracaption.filters", "paracaption.pipeline"):
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
from pathlib import Path
from typer.testing import CliRunner
from paracaption.flows.cli.app import app
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
print(*sorted({"torch", "ray", "prefect", "cv2"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_import_rule_is_checked_for_every_file():
    """`make lint` reads the package through its links: none may be skipped."""
    import grimp

    root = Path(__file__).parents[1]
    folders = ("schemas", "filters", "pipeline", "model_training", "flows")
    if not (root / "schemas").exists():
        pytest.skip("the package is an installed wheel, which `make lint` does not check")
    files = [
        path.relative_to(root).with_suffix("") for each in folders for path in (root / each).rglob("*.py")
    ]
    modules = {".".join(("paracaption", *path.parts)).removesuffix(".__init__") for path in files}
    assert grimp.build_graph("paracaption", cache_dir=None).modules == modules | {"paracaption"}
