"""docs/telemetry.md: a command has each switch of the table in its environment, and the libraries heed it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "telemetry.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="no clone, but an installed wheel")

COMMAND = """
import atexit, json, os, subprocess, sys
from paracaption.flows.cli.command import main

def report():
    child = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
    print("\\n" + json.dumps({"own": dict(os.environ), "child": json.loads(subprocess.check_output(child))}))

atexit.register(report)
sys.argv = ["paracaption", "config"]
main()
"""

LIBRARIES = """
import paracaption.flows
from huggingface_hub import constants
from prefect._internal.analytics.enabled import is_telemetry_enabled
from prefect.settings import get_current_settings
from ray._common.usage.usage_lib import usage_stats_enabled

print(constants.HF_HUB_DISABLE_TELEMETRY, not is_telemetry_enabled(), not usage_stats_enabled())
print(not get_current_settings().server.analytics_enabled)
"""


def switches() -> dict[str, tuple[str, str]]:
    """Variable -> (value, file that sets it), from the table of the page."""
    found = re.findall(r"\| `(\w+)=(\w+)` \| `([\w/.]+)` \|", PAGE.read_text()) if PAGE.exists() else []
    return {name: (value, file) for name, value, file in found}


def environment(**changes: str) -> dict[str, str]:
    """This process's environment as if nobody had switched anything off."""
    names = {*switches(), "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "CI", "VLLM_DO_NOT_TRACK"}
    return {name: value for name, value in os.environ.items() if name not in names} | changes


def run(code: str, **changes: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment(**changes), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_lists_every_switch_that_the_code_sets():
    found = {}
    for file in ("pipeline/__init__.py", "flows/__init__.py"):
        for name, value in re.findall(r'setdefault\("(\w+)", "(\w+)"\)', (ROOT / file).read_text()):
            if re.search("TRACK|USAGE|ANALYTICS|TELEMETRY", name):
                found[name] = (value, file)
    assert switches() == found and len(found) == 4


def test_a_started_command_and_what_it_starts_have_every_switch():
    reported = json.loads(run(COMMAND).splitlines()[-1])
    for name, (value, _) in switches().items():
        assert (reported["own"].get(name), reported["child"].get(name)) == (value, value)


def test_a_value_that_is_set_already_stays():
    own = json.loads(run(COMMAND, RAY_USAGE_STATS_ENABLED="1", DO_NOT_TRACK="0").splitlines()[-1])["own"]
    assert (own["RAY_USAGE_STATS_ENABLED"], own["DO_NOT_TRACK"]) == ("1", "0")
    assert own["VLLM_NO_USAGE_STATS"] == "1"


@pytest.mark.slow
@pytest.mark.soak
def test_the_libraries_themselves_say_that_they_report_nothing():
    """vLLM is left out: it loads torch to answer. Its variable is asked for above."""
    pytest.importorskip("huggingface_hub")
    assert run(LIBRARIES).split() == ["True"] * 4
