"""The file of `caption --out`: whether it may be written, what it has, and who writes it.

`FILE.run.json` says what the lines are of. It is there before the first line, is never replaced by another
file, and is what the one process locks that writes lines.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ...pipeline.io import files
from ...pipeline.io.json_lines import read_lines
from ...schemas.decoding import stored_names
from ...schemas.errors import ConfigError

if TYPE_CHECKING:
    from .caption_folder import PhotoTask


def check_place(out: str, inputs: Sequence[str | Path | None]) -> None:
    """Refuse a file that cannot be written as lines, or whose writing would change what captions are made of.

    Args:
        out: the file.
        inputs: the model, the photos and the masks: files, folders, or addresses in buckets.

    Raises:
        ConfigError: there is no such folder, or the file is one of the inputs or lies in one.
    """
    if files.is_url(out) or not Path(out).parent.is_dir():
        raise ConfigError(f"--out {out}: give a file in a folder of this machine that exists")
    if Path(out).is_dir():
        raise ConfigError(
            f"--out {out}: is a folder; name a file in it, such as {Path(out, 'captions.jsonl')}"
        )
    written = (Path(out), run_file(Path(out)))
    for given in (Path(each) for each in inputs if each is not None and not files.is_url(str(each))):
        if any(_is_same(each, given) for each in written):
            raise ConfigError(f"--out {out}: would overwrite {given}, which is read; name another file")
        if given.is_dir() and any(given.resolve() in each.resolve().parents for each in written):
            raise ConfigError(f"--out {out}: lies in {given}, which is read; name a file in another folder")


def run_file(out: Path) -> Path:
    """The file next to the lines that says what they are of."""
    return out.with_name(f"{out.name}.run.json")


def refuse_foreign(out: Path) -> None:
    """Refuse a file that has something, but not from this command.

    Raises:
        ConfigError: `run_file` is missing.
    """
    if out.exists() and out.stat().st_size and not run_file(out).exists():
        raise ConfigError(
            f"{out}: is there already, without {run_file(out).name}, which says how its lines were made; "
            "choose another --out, or move the file away"
        )


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Be the only process that writes a file of lines. The kernel ends the lock when the process dies.

    A file system without locks is written without one.

    Raises:
        ConfigError: another process is writing it, or somebody else has made it.
        OSError: it cannot be written.
    """
    refuse_foreign(out)
    with _named(out):
        open(out, "ab").close()
        beside = open(run_file(out), "ab")
    with beside:
        try:
            fcntl.flock(beside, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{out}: another process is writing it; wait until it ends, or choose another --out"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield


@contextmanager
def _named(out: Path) -> Iterator[None]:
    """An error of a file that only we know of, next to the lines or temporary, names the lines instead."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(out)) from error


def unfinished(tasks: list[PhotoTask], out: Path, header: dict[str, Any]) -> list[PhotoTask]:
    """The photos that have no captions in a file of lines yet, which is made ready to be continued.

    To be called within `only_writer`. Lines with an error are taken out, and their photos tried again.

    Args:
        tasks: all photos.
        out: the file; it need not exist.
        header: what the captions depend on.

    Raises:
        ConfigError: the lines were made with something else, or by something else.
    """
    beside = run_file(out)
    with _named(out):
        lines = [_decoded(out, number, line) for number, line in enumerate(read_lines(out), 1)]
        if lines:
            _check_header(out, beside, header)
        else:
            _write_header(beside, header)
        good = [line for line in lines if "error" not in line]
        if len(good) < len(lines):
            with files.write_atomic(out) as file:
                file.writelines(msgspec.json.encode(line) + b"\n" for line in good)
    done = {line["photo"] for line in good}
    return [task for task in tasks if task.name not in done]


def _write_header(beside: Path, header: dict[str, Any]) -> None:
    """Write it into the file that is there, which is locked."""
    with open(beside, "r+b") as file:
        file.truncate()
        file.write(files.json_text(header))
        file.flush()
        os.fsync(file.fileno())


def _check_header(out: Path, beside: Path, header: dict[str, Any]) -> None:
    try:
        found = msgspec.json.decode(beside.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, UnicodeError) as error:
        raise ConfigError(f"{beside}: cannot be read ({error}); choose another --out") from error
    wanted = msgspec.json.decode(msgspec.json.encode(header))
    if found == wanted:
        return
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    ours, theirs = wanted.get("options", {}), found.get("options")
    if "options" in changed and isinstance(theirs, dict):
        changed.remove("options")
        changed += [
            f"{name} {theirs.get(stored)}"
            for name, stored in stored_names().items()
            if ours.get(stored) != theirs.get(stored)
        ]
    raise ConfigError(
        f"{out}: its lines were made with another {', '.join(changed) or 'version'}; take the same again "
        f"({beside.name} has all of it), or choose another --out"
    )


def _decoded(out: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise ConfigError(
            f"{out}: line {number} is not JSON ({error}); if the file is of something else, choose another "
            "--out, else remove the line"
        ) from error
    if not isinstance(found.get("photo"), str):
        raise ConfigError(f"{out}: line {number} names no photo; choose another --out")
    return found
