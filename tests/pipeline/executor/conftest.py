"""Small synthetic sources; a file that needs other sizes has fixtures of its own."""

import pytest

from tests.synthetic import write_coconut, write_sa1b


@pytest.fixture(scope="module")
def coconut(tmp_path_factory) -> dict:
    return write_coconut(tmp_path_factory.mktemp("source") / "coconut", num_images=10)


@pytest.fixture(scope="module")
def sa1b(tmp_path_factory) -> dict:
    return write_sa1b(tmp_path_factory.mktemp("source") / "sa1b", num_images=6)
