"""What tests of sources share."""

import pytest

from tests.pipeline.sources.release import Release


@pytest.fixture
def release(tmp_path):
    return Release(tmp_path)
