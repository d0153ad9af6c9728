"""Real object stores on this machine: moto, ministack and azurite, and s3rver, which ignores conditions.

Each is started once in a session, on a free port of 127.0.0.1, and killed at its end. What is no development
package is installed on first use into a folder of its own outside the tree, `~/.cache/paracaption-tests`
(`PARACAPTION_TESTS_CACHE` names another); where that cannot be done, its tests are skipped and say why.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

import pytest

from tests.machinery import alone
from tests.object_server import s3_environment

if TYPE_CHECKING:
    from obstore.store import ObjectStore

MINISTACK, AZURITE, S3RVER = "1.5.33", "3.37.0", "3.7.1"
_START_S = 180.0
_INSTALL_S = 300.0
_UNTIL_STDIN_ENDS = ("sh", "-c", 'exec 3<&0; (read _ <&3; kill -9 $$) & exec "$@" 3<&- </dev/null', "sh")
"""A server ends with the tests that started it, however they end."""
_AZURE_ACCOUNT = "devstoreaccount1"
_AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""No secret: every azurite has this account."""


@dataclass(frozen=True)
class Server:
    """An object store that runs.

    Attributes:
        name: of the implementation.
        address: `http://127.0.0.1:PORT`.
        environment: all that obstore needs beside a bucket's URL (for S3 also boto3 and s3fs).
        log: what it has printed.
    """

    name: str
    address: str
    environment: dict[str, str]
    log: Path

    def url(self, bucket: str = "corpus") -> str:
        """What obstore opens with the `environment` set."""
        return f"{'az' if self.name == 'azurite' else 's3'}://{bucket}"

    def make_bucket(self, bucket: str = "corpus") -> None:
        """Nothing happens if there is one."""
        make = _make_container if self.name == "azurite" else _make_bucket
        status = make(self.address, bucket)
        if status not in (200, 201, 409):
            raise RuntimeError(f"{self.name}: status {status} for the new bucket {bucket}; see {self.log}")


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    program = str(Path(sys.executable).with_name("moto_server"))
    with _running(
        "moto", tmp_path_factory, lambda port, _: [program, "-H", "127.0.0.1", "-p", port]
    ) as server:
        yield server


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_ministack(tmp_path_factory) as server:
        yield server


class Folders(Protocol):
    """Makes folders for what a server writes."""

    def mktemp(self, basename: str) -> Path: ...


@contextmanager
def running_ministack(folders: Folders) -> Iterator[Server]:
    """A ministack while the block runs, also outside of tests."""
    program = _installed(f"ministack-{MINISTACK}", _install_ministack) / "bin" / "ministack"
    with _running("ministack", folders, lambda _port, _data: [str(program)]) as server:
        yield server


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    program = npm_program("azurite", AZURITE, "azurite-blob")
    flags = ["--silent", "--skipApiVersionCheck", "--disableTelemetry", "--blobHost", "127.0.0.1"]

    def command(port: str, data: str) -> list[str]:
        return [program, *flags, "--blobPort", port, "-l", data]

    with _running("azurite", tmp_path_factory, command) as server:
        yield server


@pytest.fixture(scope="session")
def s3rver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The negative example: it accepts every conditional put."""
    program = npm_program("s3rver", S3RVER, "s3rver")
    flags = ["--no-vhost-buckets", "--allow-mismatched-signatures", "-a", "127.0.0.1"]
    with _running(
        "s3rver", tmp_path_factory, lambda port, data: [program, *flags, "-p", port, "-d", data]
    ) as server:
        yield server


@pytest.fixture(scope="session", params=["moto", "ministack", "azurite"])
def object_store(request: pytest.FixtureRequest) -> Server:
    """Each of the three that keep conditions."""
    return request.getfixturevalue(request.param)


def race(bucket: ObjectStore, key: str, writers: int = 16) -> list[bytes]:
    """What each of those threads wrote that were told, all at the same time, that they made the object."""
    from obstore.exceptions import AlreadyExistsError

    together = threading.Barrier(writers)

    def creates(content: bytes) -> list[bytes]:
        together.wait(60)
        try:
            bucket.put(key, content, mode="create")
        except AlreadyExistsError:
            return []
        return [content]

    with ThreadPoolExecutor(writers) as threads:
        contents = [b"%d" % number for number in range(writers)]
        return [content for won in threads.map(creates, contents) for content in won]


def set_environment(patch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Let this process and what it starts talk to one object store, and know of no other."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "AZURITE_")):
            patch.delenv(name)
    for name, value in environment.items():
        patch.setenv(name, value)


def azure_environment(address: str) -> dict[str, str]:
    """What obstore reads. `AZURE_STORAGE_USE_EMULATOR` would need `AZURITE_BLOB_STORAGE_URL` for the port."""
    where = {"AZURE_STORAGE_ENDPOINT": f"{address}/{_AZURE_ACCOUNT}", "AZURE_ALLOW_HTTP": "true"}
    return {**where, "AZURE_STORAGE_ACCOUNT_NAME": _AZURE_ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": _AZURE_KEY}


@contextmanager
def _running(name: str, folders: Folders, command: Callable[[str, str], list[str]]) -> Iterator[Server]:
    """Start a server by its command (of a port and a data folder), and kill it at the end."""
    folder = folders.mktemp(name)
    port = _free_port()
    log = folder / "log.txt"
    address = f"http://127.0.0.1:{port}"
    own = {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "SERVICES": "s3", "TMPDIR": str(folder)}
    with log.open("wb") as output, alone():
        process = subprocess.Popen(
            [*_UNTIL_STDIN_ENDS, *command(str(port), str(folder / "data"))],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **own},
            cwd=folder,
            start_new_session=True,
        )
    try:
        _wait_until_it_listens(name, process, port, log)
        environment = azure_environment(address) if name == "azurite" else s3_environment(address)
        yield Server(name, address, environment, log)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def _wait_until_it_listens(name: str, process: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    ended = process.returncode if process.returncode is not None else f"not listening after {_START_S:g} s"
    raise RuntimeError(f"{name} did not start ({ended}): {log.read_text(errors='replace')[-2000:]}")


def _make_bucket(address: str, bucket: str) -> int:
    """Status of the answer."""
    import boto3
    from botocore.exceptions import ClientError

    keys = s3_environment(address)
    client = boto3.client(
        "s3",
        endpoint_url=address,
        region_name=keys["AWS_REGION"],
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
    )
    try:
        return client.create_bucket(Bucket=bucket)["ResponseMetadata"]["HTTPStatusCode"]
    except ClientError as error:
        return error.response["ResponseMetadata"]["HTTPStatusCode"]


def _make_container(address: str, container: str) -> int:
    """Status of the answer. Signed by the account's key as Azure's "Authorize with Shared Key" says: obstore
    makes no containers, and Azure's own client is no development package."""
    headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
    lines = [f"{name}:{value}" for name, value in headers.items()]
    resource = [f"/{_AZURE_ACCOUNT}/{_AZURE_ACCOUNT}/{container}", "restype:container"]
    text = "\n".join(["PUT", *[""] * 11, *lines, *resource])
    digest = hmac.new(base64.b64decode(_AZURE_KEY), text.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {_AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}"
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    try:
        connection.request("PUT", f"/{_AZURE_ACCOUNT}/{container}?restype=container", headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def _installed(name: str, install: Callable[[Path], None]) -> Path:
    """A folder with what `install` has put there, now or in an earlier run."""
    cache = os.environ.get("PARACAPTION_TESTS_CACHE") or Path.home() / ".cache" / "paracaption-tests"
    folder = Path(cache) / name
    done = folder / "installed"
    with alone():
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            install(folder)
            done.touch()
    return folder


def _install_ministack(folder: Path) -> None:
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        pytest.skip("uv is missing, which installs ministack")
    _install("ministack", uv, "venv", "--quiet", "--python", sys.executable, "--clear", str(folder))
    python = str(folder / "bin" / "python")
    _install("ministack", uv, "pip", "install", "--quiet", "--python", python, f"ministack=={MINISTACK}")


def npm_program(package: str, version: str, program: str) -> str:
    """A program of an npm package."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"npm is missing, which installs {package}")
    quiet = ["--silent", "--no-audit", "--no-fund", "--ignore-scripts"]

    def install(folder: Path) -> None:
        _install(package, npm, "install", *quiet, "--prefix", str(folder), f"{package}@{version}")

    folder = _installed(f"{package}-{version}", install)
    return str(folder / "node_modules" / ".bin" / program)


def _install(name: str, *command: str) -> None:
    """Run an installer; skip the test that asked for it if it fails, as it does without a registry."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{name} could not be installed within {_INSTALL_S:g} s")
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        pytest.skip(f"{name} could not be installed: {' '.join(last) or f'exit {done.returncode}'}")
