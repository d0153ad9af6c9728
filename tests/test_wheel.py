"""The wheel: what is in it, and that it works where the user's own modules are called as our folders are.

`make wheel-check` runs these for each Python of PARACAPTION_PYTHONS; `make test-wheel` runs the tests on one.
"""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.synthetic import shadow_modules

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = os.environ.get("PARACAPTION_PYTHONS", "3.11 3.13").split()
"""Versions, which uv finds or fetches, or paths."""
UV = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
FOLDERS = ("schemas", "filters", "pipeline", "model_training", "flows")

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not (ROOT / "pipeline").exists(), reason="no clone that a wheel could be built of"),
]


def said(command: list[str | Path], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)  # pyright: ignore
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the source distribution, so that this one is complete, too."""
    folder = tmp_path_factory.mktemp("dist")
    said([UV, "build", "--quiet", "--out-dir", folder, ROOT])
    return next(folder.glob("*.whl"))


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    listed = said(["git", "ls-files", *FOLDERS, "samples"], cwd=ROOT).split()
    tracked = {f"paracaption/{name}" for name in listed if name != "samples/make_samples.py"}
    assert packed == tracked | {"paracaption/__init__.py", "paracaption/py.typed"}


def test_every_extra_of_the_metadata_can_be_resolved(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    extras = metadata.get_all("Provides-Extra", [])
    assert set(extras) == {"models", "train", "vllm", "remote", "lmms"}
    for extra in extras:
        said([UV, "pip", "compile", "--quiet", "--extra", extra, ROOT / "pyproject.toml", "--no-header"])


@pytest.fixture(params=PYTHONS)
def venv(request, wheel, tmp_path) -> Iterator[Path]:
    """An environment with the wheel and what it requires."""
    folder = tmp_path / "venv"
    command = [UV, "venv", "--quiet", "--python", request.param, folder]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no Python {request.param}, which PARACAPTION_PYTHONS may name by path: {made.stderr}")
    install = [UV, "pip", "install", "--quiet", "--python", folder / "bin" / "python", wheel]
    said([*install, "--constraint", ROOT / "requirements.lock"])
    yield folder
    shutil.rmtree(folder)  # a gigabyte


def test_the_wheel_builds_the_demo_beside_modules_of_the_same_names(venv, tmp_path):
    shadows = shadow_modules(tmp_path)
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PREFECT_API_URL")}
    env["PREFECT_HOME"] = str(tmp_path / "prefect")
    script = "import paracaption; print(paracaption.__file__); paracaption.build; paracaption.ConfigError"
    where = said([venv / "bin" / "python", "-c", script], cwd=shadows, env=env)
    assert Path(where.strip()).is_relative_to(venv)
    out = tmp_path / "out"
    paracaption = venv / "bin" / "paracaption"
    assert "the dataset card: " in said([paracaption, "demo", "--out", out], cwd=shadows, env=env)
    assert "complete and undamaged" in said([paracaption, "verify", out], cwd=shadows, env=env)
