"""A corpus whose masks are answers of a model: killed and resumed, equal to the last byte."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.building import build, calls, committed, config_of
from tests.faults.test_kill import KILLS
from tests.faults.test_kill_recipe import kill_and_resume
from tests.machinery import alone
from tests.synthetic import write_boxes

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(1800)]


def _slow(root: Path, source: dict, apart: bool = False):
    """Backends that take their time, so that a kill finds them at work."""
    return config_of(
        root / "out",
        subsets={"det": {"sources": [source]}},
        apart=apart,
        images_per_shard=3,
        segmenter={"delay_s": 0.1, "batch_images": 1},
        captioner={"delay_s": 0.03, "batch_images": 2},
        judge={"delay_s": 0.02},
        failures={"save_every_s": 0.05},
    )


def _paid(root: Path) -> Counter[str]:
    """Captions; a segmenter's log names boxes and not the images that they are of."""
    return Counter(f"caption/{call}" for call in calls(root / "captioner.log"))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> dict:
    return write_boxes(tmp_path_factory.mktemp("source"), 18, 3, (48, 64))


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("undisturbed")
    build(_slow(root, source))
    assert len(calls(root / "segmenter.log")) == 54
    return committed(root / "out")


@pytest.mark.parametrize("kills", [3, pytest.param(KILLS, marks=pytest.mark.soak)])
def test_a_local_build_of_boxes_killed_at_random_moments(tmp_path, source, undisturbed, kills):
    kill_and_resume(_slow(tmp_path, source), undisturbed, _paid, kills, 1.0)
    asked = len(calls(tmp_path / "segmenter.log"))
    assert asked <= 54 + 4 * 3 * kills, "masks that were kept as evidence were paid for again"


@pytest.mark.soak
@pytest.mark.ray
def test_a_build_of_boxes_under_ray_is_the_local_one_also_when_it_is_killed(tmp_path, source, undisturbed):
    from ray.cluster_utils import Cluster

    with alone():
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        config = _slow(tmp_path, source, apart=True)
        kill_and_resume(config, undisturbed, _paid, min(KILLS, 3), 6.0, cluster.address)
    finally:
        cluster.shutdown()
