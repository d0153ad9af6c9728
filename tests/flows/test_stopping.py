"""A command that is stopped says one line and leaves no process, whatever it was doing."""

import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.stopped import Stopped, run_and_stop

BEGIN = """
import os, signal, subprocess, sys, threading, time, types
from paracaption.flows import stopping

def command():
{body}

def ready():
    print("ready", flush=True)

stopping.run(command)
"""

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
)


def stopped(body: str, *signals: int, to_all: bool = False, ignoring: bool = False) -> Stopped:
    """Run a program, send it signals when it says that it is ready, and look at what is left."""
    lines = BEGIN.format(body=textwrap.indent(textwrap.dedent(body), "    "))
    return run_and_stop([sys.executable, "-c", lines], signals, to_all=to_all, ignoring=ignoring)


pytestmark = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="processes are found in /proc"
)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
@pytest.mark.soak
def test_a_command_unwinds_and_says_what_is_done(number, code):
    found = stopped(
        """
        stopping.say(lambda: "3 of 4 are done")
        try:
            ready()
            time.sleep(60)
        finally:
            print("unwound", flush=True)
        """,
        number,
    )
    assert (found.code, found.out, found.errors) == (code, "unwound\n", "stopped: 3 of 4 are done\n")
    assert found.seconds < 5


@pytest.mark.parametrize(
    "wait",
    [
        "time.sleep(60)",
        "threading.Lock().acquire() and threading.Event().wait()",
        "os.read(os.pipe()[0], 1)",
        "subprocess.run(['sleep', '60'])",
        "exec('while True: pass')",
    ],
)
@pytest.mark.soak
def test_a_command_ends_whatever_it_waits_for(wait):
    found = stopped(f"ready()\n{wait}", signal.SIGINT)
    assert (found.code, found.errors, found.left) == (130, "stopped\n", [])
    assert found.seconds < 5


@pytest.mark.soak
def test_what_goes_on_after_an_interrupt_is_ended():
    found = stopped(
        """
        try:
            ready()
            time.sleep(60)
        except BaseException:
            pass
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
        """,
        signal.SIGTERM,
    )
    assert (found.code, found.errors) == (143, "stopped\n")
    assert 1.5 < found.seconds < 6


@pytest.mark.soak
def test_an_interrupt_that_is_lost_while_an_object_is_cleaned_up_is_not_shown():
    found = stopped(
        """
        class Slow:
            def __del__(self):
                ready()
                time.sleep(60)

        Slow()
        time.sleep(60)
        """,
        signal.SIGINT,
    )
    assert (found.code, found.errors) == (130, "stopped\n")


def test_nothing_is_unwound_where_that_would_take_too_long():
    found = stopped(
        """
        with stopping.at_once():
            try:
                ready()
                time.sleep(60)
            finally:
                print("unwound", flush=True)
                time.sleep(60)
        """,
        signal.SIGINT,
    )
    assert (found.code, found.out, found.errors) == (130, "", "stopped\n")
    assert found.seconds < 4


@pytest.mark.soak
def test_handlers_that_a_library_sets_change_nothing():
    found = stopped(
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGINT, lambda *_: None)
        with stopping.at_once():
            ready()
            time.sleep(60)
        """,
        signal.SIGTERM,
    )
    assert (found.code, found.errors) == (143, "stopped\n")


@pytest.mark.soak
def test_no_child_is_left_that_ignores_signals_or_hides_in_a_session_of_its_own():
    found = stopped(
        f"""
        child = [sys.executable, "-c", {STUBBORN!r}]
        for options in ({{}}, {{"start_new_session": True}}):
            subprocess.Popen(child, stdout=subprocess.PIPE, **options).stdout.readline()
        daemon = "from subprocess import *; import sys; Popen(sys.argv[1:], stdout=PIPE).stdout.readline()"
        subprocess.run([sys.executable, "-c", daemon, *child])
        ready()
        time.sleep(60)
        """,
        signal.SIGINT,
        to_all=True,
    )
    assert (found.code, found.errors, found.left) == (130, "stopped\n", [])
    assert found.seconds < 6


@pytest.mark.soak
def test_shared_memory_of_a_killed_child_is_given_back():
    found = stopped(
        """
        child = '''if True:
            import signal, time
            from multiprocessing import shared_memory
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print(shared_memory.SharedMemory(create=True, size=4096).name, flush=True)
            time.sleep(60)
        '''
        process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
        name = process.stdout.readline().strip()
        stopping.say(lambda: name)
        ready()
        time.sleep(60)
        """,
        signal.SIGINT,
    )
    name = found.errors.splitlines()[-1].removeprefix("stopped: ")  # a tracker warns before
    assert name.startswith("psm_") and not Path("/dev/shm", name).exists() and found.left == []


@pytest.mark.soak
def test_a_second_ctrl_c_changes_nothing():
    body = f"""
        subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], stdout=subprocess.PIPE).stdout.readline()
        with stopping.at_once():
            ready()
            time.sleep(60)
    """
    found = stopped(body, *[signal.SIGINT] * 5, to_all=True)
    assert (found.code, found.errors, found.left) == (130, "stopped\n", [])


@pytest.mark.soak
def test_what_is_done_is_left_out_if_it_takes_too_long_to_find_out():
    found = stopped(
        """
        stopping.say(lambda: time.sleep(60))
        with stopping.at_once():
            ready()
            time.sleep(60)
        """,
        signal.SIGINT,
    )
    assert (found.code, found.errors) == (130, "stopped\n")
    assert found.seconds < 5


def test_a_command_in_the_background_of_a_script_goes_on_ignoring_ctrl_c():
    found = stopped("ready()\ntime.sleep(1)\nprint('done')", signal.SIGINT, ignoring=True)
    assert (found.code, found.out, found.errors) == (0, "done\n", "")


def test_an_error_that_is_no_interrupt_is_raised_as_ever():
    found = stopped("ready()\nraise ValueError('mine')")
    assert found.code == 1 and found.errors.endswith("ValueError: mine\n")


@pytest.mark.soak
def test_start_up_can_be_stopped_at_any_moment_without_a_traceback(tmp_path):
    draw = random.Random(7)
    for _ in range(6):
        command = [sys.executable, "-m", "paracaption.flows.cli", "build", "samples/build.yaml", "--local"]
        command = [str(Path(sys.executable).with_name("paracaption")), *command[3:]]
        found = run_and_stop(command, (signal.SIGINT,), draw.uniform(0.3, 2.5), to_all=True)
        assert found.code == 130 and found.left == []
        assert found.errors.splitlines()[-1].startswith("stopped") and "Traceback" not in found.errors


def test_a_signal_that_comes_while_python_ends_changes_nothing():
    found = stopped(
        """
        class Last:
            kill, number = os.kill, signal.SIGTERM

            def __del__(self):
                Last.kill(number_of_process, self.number)

        global last, number_of_process
        number_of_process = os.getpid()
        last = Last()
        ready()
        """
    )
    assert (found.code, found.errors) == (0, "")


def test_a_signal_in_the_work_of_other_modules_at_the_end_ends_it_without_a_word():
    found = stopped(
        """
        import atexit
        atexit.register(lambda: (ready(), time.sleep(60)))
        """,
        signal.SIGTERM,
    )
    assert (found.code, found.errors) == (0, "")
    assert found.seconds < 5


def test_before_signals_are_heeded_nothing_that_takes_time_is_imported():
    program = "import sys, paracaption.flows.cli.command; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"pydantic", "typer", "msgspec", "numpy"} & set(done.stdout.split())


def test_a_ray_that_does_not_end_does_not_keep_a_command_that_is_done():
    """Its end waits for its servers without a limit. Here it waits for a lock that nobody gives back."""
    found = stopped(
        """
        stopping._LEAVE_RAY_S = 0.5
        sys.modules["ray"] = types.SimpleNamespace(
            is_initialized=lambda: True, shutdown=lambda: threading.Event().wait()
        )
        subprocess.Popen(["sleep", "60"])
        ready()
        sys.exit(3)
        """
    )
    assert (found.code, found.errors, found.left) == (3, "", [])
    assert found.seconds < 10
