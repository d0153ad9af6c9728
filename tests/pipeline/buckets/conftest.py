"""One corpus in a folder and in a bucket for all tests that read."""

import pytest

from paracaption.pipeline.io import scratch
from tests.object_server import serving
from tests.pipeline.buckets import corpora


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with serving() as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        patch.setenv(scratch.VARIABLE, str(tmp_path_factory.mktemp("scratch")))
        yield started


@pytest.fixture(scope="session")
def pair(server, tmp_path_factory):
    return corpora.make(tmp_path_factory.mktemp("pair"), server)
