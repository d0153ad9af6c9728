"""Tests of one group run in one process, and long groups first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import groups

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import os, time
import pytest

def note(group):
    with open("{log}", "a") as file:
        file.write(f"{group} {os.getpid()}\\n")
    time.sleep(0.1)

@pytest.mark.parametrize("number", range(3))
def test_plain(number):
    note("{name}")

@pytest.mark.ray
def test_with_ray():
    note("ray")

@pytest.mark.vllm
def test_with_vllm():
    note("vllm")
"""


@pytest.mark.soak
def test_the_tests_of_a_group_share_a_process(tmp_path):
    names, log = ("first", "second", "third"), tmp_path / "log"
    for name in names:
        text = TESTS.replace("{name}", name).replace("{log}", str(log))
        (tmp_path / f"test_{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", str(tmp_path), "-p", "tests.groups", "-p", "no:cacheprovider"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command += ["--numprocesses", "2", "--dist", "loadgroup", "--no-loadscope-reorder"]
    command += ["--basetemp", str(tmp_path / "own")]  # else one in PYTEST_ADDOPTS would be wiped
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "| ray |" in done.stdout and "| all |" in done.stdout
    ran = [tuple(line.split()) for line in log.read_text().splitlines()]
    assert len(ran) == 15 and len({process for _, process in ran}) == 2
    engines = [(name, process) for name, process in ran if name in ("ray", "vllm")]
    assert len({process for _, process in engines}) == 1, "Ray is not started beside a vLLM engine"
    assert [name for name, _ in engines] == ["ray"] * 3 + ["vllm"] * 3
    assert [len({process for name, process in ran if name == group}) for group in ("ray", *names)] == [1] * 4
    begins = dict(reversed([(process, name) for name, process in ran]))
    assert "ray" in begins.values(), "the group with the largest budget comes first"


@pytest.mark.soak
def test_the_first_cases_of_a_test_are_kept_from_the_soak(tmp_path):
    lines = ["import pytest", "@pytest.mark.parametrize('n', range(5))", "@pytest.mark.soak(keep=2)"]
    lines += ["def test_some(n):", "    pass", "@pytest.mark.soak", "def test_none():", "    pass"]
    (tmp_path / "test_some.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "pytest", str(tmp_path), "-p", "tests.groups", "-p", "no:cacheprovider"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "--collect-only", "-q"]
    wanted = {"not soak": ["some[0]", "some[1]"], "soak": ["none", "some[2]", "some[3]", "some[4]"]}
    for chosen, cases in wanted.items():
        plain = os.environ | {"PYTEST_ADDOPTS": ""}  # which may ask for less than names
        done = subprocess.run([*command, "-m", chosen], cwd=ROOT, capture_output=True, text=True, env=plain)
        found = [line.partition("::test_")[2] for line in done.stdout.splitlines() if "::" in line]
        assert sorted(found) == cases, done.stdout


def test_every_group_with_a_budget_exists():
    files = {path.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    assert groups.budget().keys() <= {*files, *groups.KINDS, "each other file"}
