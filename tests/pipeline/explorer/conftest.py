"""One corpus and one server for all tests of the explorer; a browser where there is one."""

import shutil
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from paracaption.pipeline.explorer.app import make_app
from paracaption.pipeline.explorer.catalog import Catalog
from paracaption.pipeline.explorer.context import Explorer
from tests.chromium import browser as browser
from tests.pipeline.explorer import corpus, runs


@pytest.fixture(scope="session")
def out(tmp_path_factory) -> Path:
    return corpus.write_merged(tmp_path_factory.mktemp("explorer"))


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    return runs.write(tmp_path_factory.mktemp("run") / "tiny")


@pytest.fixture(scope="session")
def catalog(out) -> Catalog:
    return Catalog(out)


@pytest.fixture(scope="session")
def explorer(out, run) -> Explorer:
    return Explorer(out, run)


@pytest.fixture(scope="session")
def client(explorer) -> TestClient:
    return TestClient(make_app(explorer), base_url="http://localhost:8080")


@pytest.fixture(scope="session")
def address(out, run, tmp_path_factory):
    """Of a server of its own on a corpus of its own, started by the command."""
    out = shutil.copytree(out, tmp_path_factory.mktemp("served") / "out")
    with corpus.serving(out, "--run", str(run)) as printed:
        yield printed.removesuffix("/")
