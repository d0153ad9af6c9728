"""Ctrl-C, SIGTERM and SIGHUP, at any moment: one line that says what is done, and no process left behind.

A command that is stopped has two seconds to unwind. Then, or at once where Prefect or Ray would unwind for a
minute and more (`at_once`), the process becomes another program, `end_children.py`: every thread of the
command is gone from one moment to the next, while the processes that it started are still its children and
are ended. Nothing has to be unwound for the data's sake: what is committed survives a kill.

The signal is read by a thread, since the main thread may wait in a library for minutes. It is woken by C code
whichever handler Python code has set, so Ray's and Prefect's handlers change nothing. Only that thread takes
SIGINT, which all others, and so all processes that are started, have blocked: a Ctrl-C at a terminal goes to
everyone there, and each would print a traceback of its own.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

UNWIND_S = 2.0
"""How long a command may take to unwind."""

_SENTENCE_S = 1.0
"""How long it may take to find out what is done, and to tell a server."""

_LEAVE_RAY_S = 30.0
"""How long Ray may take to end after a command is done. It takes 3 s."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NUDGE = signal.SIGURG
"""Wakes the main thread from a wait, so that it unwinds; nothing else uses it."""
_PR_SET_CHILD_SUBREAPER = 36

_ending = threading.Lock()
_signal_pipe: int | None = None
_reading = False
_received: int | None = None
_at_once = False
_say: Callable[[], str] = str
_tell: Callable[[str], object] | None = None


def run(command: Callable[[], object]) -> None:
    """Run a program that a signal may stop: the rest of the process.

    Args:
        command: imports what it needs itself, so that the signals are heeded before.
    """
    _install()
    try:
        command()
        _leave_ray(0)
    except KeyboardInterrupt:
        end()
    except BaseException as error:  # what a library makes of the interrupt
        if _was_just_asked() and not (isinstance(error, SystemExit) and not error.code):
            end()
        if isinstance(error, SystemExit):
            _leave_ray(error.code if isinstance(error.code, int) else int(error.code is not None))
        raise


def _install() -> None:
    """Heed the signals in this process. Called first of all, since a person may be quick.

    A signal that the process ignores from its start, as in the background of a script, stays ignored.
    """
    for each in _SIGNALS:
        if signal.getsignal(each) is not signal.SIG_IGN:
            signal.signal(each, _unwind)
    signal.signal(_NUDGE, lambda *_: None)
    atexit.register(_leave)  # the first that is registered is the last that is called
    sys.unraisablehook = functools.partial(_show_unraisable, sys.unraisablehook)
    global _signal_pipe
    read, write = os.pipe()
    _signal_pipe = read
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_wait, args=(read,), daemon=True, name="stopping").start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    with suppress(OSError, AttributeError):  # of Linux: what our children leave behind becomes our child
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _leave() -> None:
    """Heed the signals no longer: Python ends, and would give them back their first meaning, a kill."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def was_asked() -> bool:
    """Whether a signal has come."""
    return _received is not None


def _was_just_asked() -> bool:
    """The same, if the thread that reads the signals may not have got to run yet."""
    if _signal_pipe is not None and (select.select([_signal_pipe], [], [], 0)[0] or _reading):
        until = time.monotonic() + UNWIND_S
        while not was_asked() and time.monotonic() < until:
            time.sleep(0.01)
    return was_asked()


@contextmanager
def at_once() -> Iterator[None]:
    """Within the block nothing is unwound: what waits there would take too long."""
    global _at_once
    before, _at_once = _at_once, True
    try:
        yield
    finally:
        _at_once = before


def say(sentence: Callable[[], str]) -> None:
    """What to ask for the rest of the line "stopped: ...": what is done, and how to go on."""
    global _say
    _say = sentence


def tell(whom: Callable[[str], object] | None) -> None:
    """What to call with a sentence when the command is stopped; nobody waits for it for more than a second.

    For those who would otherwise think that the command still runs. None tells nobody.
    """
    global _tell
    _tell = whom


def end(signum: int | None = None) -> NoReturn:
    """End this process and all that it started, with the exit code of the signal that came."""
    number = signum or _received or signal.SIGINT
    if not _ending.acquire(blocking=False):
        while True:  # the other thread does it
            time.sleep(1)
    whom = _tell
    asked = [_sentence]
    if whom is not None:
        asked.append(lambda: str(whom(f"stopped by {signal.Signals(number).name}")))
    line = f"stopped{_in_time(*asked)}"
    _become_end_children(128 + number, line)


def _become_end_children(code: int, line: str) -> NoReturn:
    _in_time(_flush)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # and so in the program that takes over
    program = Path(__file__).with_name("end_children.py")
    with suppress(OSError):
        os.execv(sys.executable, [sys.executable, "-P", str(program), str(code), line])
    os._exit(code)


def _leave_ray(code: int) -> None:
    """Disconnect from Ray, or end what was started of it; if that does not end, exit all the same.

    Ray asks its own servers something at its end, and waits for the answer without a limit.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    leaving = threading.Thread(target=ray.shutdown, daemon=True)
    leaving.start()
    leaving.join(_LEAVE_RAY_S)
    if leaving.is_alive() and _ending.acquire(blocking=False):
        _become_end_children(code, "")


def _unwind(number: int, _frame: FrameType | None) -> None:
    global _received
    _received = _received or number
    if not _at_once:
        raise KeyboardInterrupt


def _show_unraisable(show: Callable[[Any], object], unraisable: Any) -> None:
    """Say nothing of an interrupt that came while an object was cleaned up, and was lost there."""
    if not (was_asked() and isinstance(unraisable.exc_value, KeyboardInterrupt)):
        show(unraisable)


def _wait(read: int) -> None:
    global _received, _reading
    while True:
        _reading = False
        select.select([read], [], [])  # until the flag is up, what has come is still in the pipe
        _reading = True
        for number in os.read(read, 64):
            if number in _SIGNALS:
                _received = _received or number
                if not _at_once:
                    signal.pthread_kill(threading.main_thread().ident or 0, _NUDGE)
                    time.sleep(UNWIND_S)
                end(number)


def _sentence() -> str:
    said = _say()
    return f": {said}" if said else ""


def _flush() -> str:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    return ""


def _in_time(*asked: Callable[[], str]) -> str:
    """What the first function returns, "" if it takes too long or fails: a folder may be away, a pipe full.

    All are called at the same time.
    """
    found = [""] * len(asked)

    def run(place: int) -> None:
        with suppress(Exception):
            found[place] = asked[place]()

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(asked))]
    deadline = time.monotonic() + _SENTENCE_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return found[0]
