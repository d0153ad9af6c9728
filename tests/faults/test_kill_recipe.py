"""A recipe of one's own with two captioners and a vote: killed and resumed, equal to the last byte."""

from __future__ import annotations

import random
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.building import build, calls, committed
from tests.faults.test_kill import KILLS, _at_work, _drive, _evidence_rows
from tests.machinery import alone
from tests.pipeline.stages.test_composite import captioner, configured, judge

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(1800)]


def _recipe(root: Path, apart: bool = False) -> object:
    """Two captioners, the second where the first judge says no, then a vote of two more judges."""
    entries = [
        captioner(root, "first", "tests.backends:InstantCaptioner", delay_s=0.03),
        judge(root, "strict", "A cat of"),
        captioner(root, "second", delay_s=0.03),
        judge(root, "one", "tree"),
        judge(root, "two", "tree of 4"),
    ]
    for number, entry in enumerate(entries, start=1):
        backend = entry.get("captioner") or entry["judge"]
        backend |= {"batch_images": 2, "num_cpus": 0.1 + 0.01 * number * apart}
        backend["options"].setdefault("delay_s", 0.02)
    first, strict, second, one, two = entries
    return configured(
        root,
        "usable_masks",
        {"fallback": [[first, strict], second], "id": "described"},
        {"vote": [one, two], "id": "agreed", "at_least": 1},
        "clean_text",
        images_per_shard=1,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("undisturbed")
    build(_recipe(root))
    return committed(root / "out")


def kill_and_resume(
    config,
    undisturbed: dict[str, str],
    paid_for: Callable[[Path], Counter[str]],
    kills: int,
    longest_s: float,
    *address: str,
) -> None:
    """Kill drivers at random moments of their work, then let one finish; nothing is paid twice.

    `paid_for` counts what was asked so far, as "stage/key/region".
    """
    root, rng = Path(config.out).parent, random.Random(3)
    killed = 0
    for _ in range(4 * kills):
        before, paid = _evidence_rows(config), paid_for(root)
        driver = _drive(config, *address)
        if _at_work(config, driver):
            try:
                driver.wait(rng.uniform(0.0, longest_s))
            except subprocess.TimeoutExpired:
                driver.send_signal(signal.SIGKILL)
                killed += driver.wait() == -signal.SIGKILL
        assert driver.wait() in (0, -signal.SIGKILL), (root / "config.log").read_text()[-3000:]
        known = {f"{stage.partition('/')[2]}/{key}/{region}" for stage, key, region in before}
        assert not (paid_for(root) - paid).keys() & known, "an answer that was kept was paid for again"
        if driver.returncode == 0 or killed == kills:
            break
    assert killed
    assert _drive(config, *address).wait(300) == 0, (root / "config.log").read_text()[-3000:]
    assert committed(root / "out") == undisturbed


def _paid(root: Path) -> Counter[str]:
    return Counter(f"{name}/{call}" for name in ("first", "second") for call in calls(root / f"{name}.log"))


def test_two_captioners_and_a_vote_killed_and_resumed_are_equal_to_the_last_byte(tmp_path, undisturbed):
    kill_and_resume(_recipe(tmp_path), undisturbed, _paid, 3, 0.8)


@pytest.mark.soak
@pytest.mark.ray
def test_two_captioners_and_a_vote_killed_and_resumed_under_ray(tmp_path, undisturbed):
    from ray.cluster_utils import Cluster

    with alone():
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        config = _recipe(tmp_path, apart=True)
        kill_and_resume(config, undisturbed, _paid, min(KILLS, 3), 6.0, cluster.address)
    finally:
        cluster.shutdown()
