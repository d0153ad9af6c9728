"""The same corpus in a folder and in a bucket, built twice with other rules, so that it has a history."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from typer.testing import CliRunner

from paracaption.flows.cli.app import app
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.schemas.errors import ParaCaptionError
from tests.building import build, config_of
from tests.object_server import ObjectServer
from tests.synthetic import write_coconut, write_sa1b

STRICT = {"min_area_px": 1500}
"""Rules that drop some regions."""


class Pair(NamedTuple):
    """Two corpora that say the same."""

    folder: Path
    bucket: str
    server: ObjectServer
    beside: Path

    def copy(self, name: str) -> Pair:
        """Both once more, to be changed."""
        folder = self.folder.with_name(name)
        shutil.copytree(self.folder, folder)
        prefix, new = self.bucket.partition("corpus/")[2], f"s3://corpus/{name}"
        for key in self.server.objects("corpus", f"{prefix}/"):
            write(self.server, f"{name}{key.removeprefix(prefix)}", self.server.content(key))
        return self._replace(folder=folder, bucket=new)

    def run(self, *command: str) -> tuple[int, str]:
        """Run a command on both; what it says of the one in the bucket, which is what it says of the other.

        In the command, CORPUS stands for the corpus and OUT for a folder of this machine.
        """
        said = []
        for at, number in ((str(self.folder), 0), (self.bucket, 1)):
            place = str(self.beside / f"out-{number}")
            given = [each.replace("CORPUS", at).replace("OUT", place) for each in command]
            said.append(run(given, {at: "CORPUS", place: "OUT"}))
        if said[0] != said[1]:
            raise AssertionError("\n--- in the bucket:\n".join(f"{code}\n{text}" for code, text in said))
        return said[1]


@contextmanager
def count(server: ObjectServer) -> Iterator[list[str]]:
    """The keys of the requests that a block makes, one for each."""
    last = max((each["number"] for each in server.requests()), default=-1)
    keys: list[str] = []
    yield keys
    keys += ["".join(each["keys"]) for each in server.requests(last)]


def write(server: ObjectServer, key: str, data: bytes) -> None:
    """Put an object there."""
    import httpx

    assert httpx.put(f"{server.address}/corpus/{key}", content=data).is_success


def run(command: list[str], names: dict[str, str]) -> tuple[int, str]:
    """Exit code, and what a command prints, without what differs between two runs."""
    done = CliRunner().invoke(app, command)
    text = done.output
    if isinstance(done.exception, ParaCaptionError):  # the entry point prints it
        text += f"error: {done.exception}"
    elif done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    for name, shown in names.items():
        text = text.replace(name, shown)
    return done.exit_code, _steady(text)


_CHANGES = (
    (re.compile(r"-[0-9a-f]{12}(?=\.[a-z]+\b)"), ""),  # the nonces of names
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d"), "TIME"),
    (re.compile(r"last sign of life .* ago"), "AGE"),
    (re.compile(r"^  rate: .*$", re.MULTILINE), ""),
    (re.compile(r"[\d,.]+%$", re.MULTILINE), "N%"),
    (re.compile(r"\d+@\S+"), "PROCESS"),
)


def _steady(text: str) -> str:
    for pattern, new in _CHANGES:
        text = pattern.sub(new, text)
    return "\n".join(_without_speed(line) for line in text.splitlines())


def _without_speed(line: str) -> str:
    """A line of the table of model stages without its numbers."""
    return re.sub(r" {2,}1 .*%$", "  SPEED", line)


def make(beside: Path, server: ObjectServer) -> Pair:
    """Build both, then once more with stricter rules."""
    sources = {
        "coconut": write_coconut(beside / "coconut", 9),
        "sa1b": write_sa1b(beside / "sa1b", 2),
    }
    found = Pair(beside / "built", "s3://corpus/built", server, beside)
    for out in (str(found.folder), found.bucket):
        build(config_of(out, beside=beside, **sources))
        driver.build(config_of(out, beside=beside, masks=STRICT, **sources), LocalEngine())
    return found
