"""Images and regions of a build."""

from __future__ import annotations

import pytest

from paracaption.pipeline.executor.estimate.sizes import Size, choose_sizes
from paracaption.schemas.errors import ConfigError
from tests.pipeline.executor.estimate.cases import config, measured


def test_sizes_are_given_counted_or_the_papers():
    known = measured()
    sizes = choose_sizes(config(), known, ["coconut=5_000/70_000"], False)
    assert sizes == {"coconut": Size(5_000, 70_000)}
    assert choose_sizes(config(), known, ["coconut=50"], False) == {"coconut": Size(50, 500)}
    assert choose_sizes(config(), known, [], False) == {"coconut": Size(334_000, 3_400_000)}
    for wrong in ("sa1b=5/5", "coconut=x", "coconut"):
        with pytest.raises(ConfigError, match="--images"):
            choose_sizes(config(), known, [wrong], False)
