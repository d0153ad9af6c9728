"""A disk that fails at any call of planning, and files that no command can read, are one line each."""

from __future__ import annotations

import builtins
import errno
import os
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from paracaption.flows.cli import app as cli
from tests.synthetic import write_coconut

_CALLS = ("stat", "scandir", "listdir", "open")


class Disk:
    """Fails with EIO at the call of a number, and at all after it, for what lies below a folder."""

    def __init__(self, below: Path, monkeypatch: pytest.MonkeyPatch):
        self.below, self.calls, self.fails_at = str(below), 0, sys.maxsize
        for holder, name in ((builtins, "open"), *((os, each) for each in _CALLS)):
            monkeypatch.setattr(holder, name, self.failing(getattr(holder, name)))

    def failing(self, call):
        def called(path=".", *arguments, **named):
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.below):
                self.calls += 1
                if self.calls >= self.fails_at:
                    raise OSError(errno.EIO, os.strerror(errno.EIO), os.fspath(path))
            return call(path, *arguments, **named)

        return called


def run(*arguments: object) -> int:
    """The exit code of a command in this process. What would be a traceback is raised."""
    before = sys.argv
    sys.argv = ["paracaption", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.fixture
def config(tmp_path) -> Path:
    values = {
        "out": "./out",
        "coconut": write_coconut(tmp_path / "data [1]", 1, 1),
        "captioner": {"name": "classical"},
        "judge": {"name": "lexical"},
        "failures": {"read_retry_s": 0, "min_free_gb": 0},
    }
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.soak
def test_a_disk_that_fails_at_any_call_of_an_audit_ends_in_one_line_or_in_a_report(
    tmp_path, config, capsys, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patched:
        disk = Disk(tmp_path, patched)
        assert run("audit", config) == 0
        calls = disk.calls
    assert calls > 15
    capsys.readouterr()
    ended = []
    for number in range(1, calls + 1):
        with monkeypatch.context() as patched:
            Disk(tmp_path, patched).fails_at = number
            code = run("audit", config)
        told = capsys.readouterr()
        errors = [line for line in told.err.splitlines() if not line.startswith(str(tmp_path))]
        ended.append(code)
        if code:
            assert code == 2, told.err
            assert len(errors) == 1, told.err
            assert errors[0].startswith("error: ") and str(tmp_path) in errors[0]
        else:
            assert "source_unavailable" in told.out  # a record that was not read is no verdict on it
    assert ended.count(2) > 10


@pytest.mark.parametrize("command", ["build", "doctor", "estimate", "audit", "merge"])
@pytest.mark.parametrize("content", [b"[" * 5_000, b"a: " + b"9" * 400, b"\xff\xfe", b"a: !!int x"])
@pytest.mark.soak(keep=3)
def test_a_configuration_that_nobody_can_read_is_one_line(tmp_path, capsys, command, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    assert run(command, path) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("error: ") and str(path) in told


def test_an_output_that_may_not_be_written_is_one_line(tmp_path, config, capsys, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "mkdir", refuse)
    assert run("audit", config) == 2
    told = capsys.readouterr().err
    assert told.splitlines() == [
        f"error: {tmp_path / 'out'}: Permission denied; give this user the permission, or choose another "
        "place"
    ]
