"""The toy benchmark and the commands that it runs."""

import signal
import sys

import pytest

from tests.stopped import run_and_stop

SCRIPT = """
import sys
from benchmarks import toy
real = toy.subprocess.Popen
def popen(line):
    child = "import sys, time; sys.stdout.write('ready\\\\n'); sys.stdout.flush(); time.sleep(600)"
    return real([sys.executable, "-c", child])
toy.subprocess.Popen = popen
toy.end_when_terminated()
toy.run_command("build", "nothing.yaml")
"""


@pytest.mark.soak
def test_a_terminated_benchmark_leaves_no_command_behind():
    command = [sys.executable, "-c", SCRIPT]
    stopped = run_and_stop(command, (signal.SIGTERM,))
    assert (stopped.code, stopped.left) == (143, []), stopped.errors
