"""What the engine on Ray says to Ray, without one: the tests of the engine itself are in `test_ray.py`."""

from __future__ import annotations

import logging
import types

import cloudpickle
import pytest

from paracaption.pipeline.corpus.events import Event
from paracaption.pipeline.executor import ray_metrics
from paracaption.pipeline.executor.estimate.pools import find_pools
from paracaption.pipeline.executor.operators import operators_of
from paracaption.pipeline.executor.ray_data import RayEngine, actor_class
from paracaption.pipeline.executor.ray_metrics import COUNTERS, RayMetrics
from paracaption.pipeline.executor.workers import Workers
from paracaption.pipeline.stages.recipes import recipe_of
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.manifest import FileEntry, Manifest
from tests.building import config_of
from tests.pipeline.stages import test_composite as recipe_tests


@pytest.fixture
def ray_init(monkeypatch):
    """Stands in for `ray.init`: what it was called with."""
    ray = pytest.importorskip("ray")
    given: list[tuple] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *args, **named: given.append((*args, named.get("address"))))
    return given


@pytest.mark.parametrize("named", ["10.1.2.3:6379", "auto", "ray://10.1.2.3:10001", None])
@pytest.mark.soak
def test_without_an_address_a_build_starts_a_ray_of_its_own_beside_any_cluster(
    tmp_path, coconut, ray_init, monkeypatch, named
):
    if named:
        monkeypatch.setenv("RAY_ADDRESS", named)
    RayEngine(None).start(config_of(tmp_path / "out", coconut=coconut))
    assert ray_init == [("local", None)]


def test_a_healthy_start_of_ray_says_nothing_that_looks_like_a_problem(tmp_path, coconut, ray_init):
    RayEngine(None).start(config_of(tmp_path / "out", coconut=coconut))
    tokens = logging.getLogger("ray._private.authentication.authentication_token_setup")
    assert not tokens.isEnabledFor(logging.WARNING) and tokens.isEnabledFor(logging.ERROR)


def test_without_an_address_training_starts_a_ray_of_its_own_beside_any_cluster(ray_init, monkeypatch):
    pytest.importorskip("torch")
    from paracaption.model_training.train import ray_train

    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")
    workers = types.SimpleNamespace(ray=types.SimpleNamespace(workers=2, cpus=1))
    ray_train._start(workers, None)  # pyright: ignore[reportArgumentType]
    assert ray_init == [("local", None)]


def test_the_class_of_a_steps_actors_has_its_name_and_can_be_sent(tmp_path, sa1b):
    config = config_of(tmp_path / "out", sa1b=sa1b, apart=True)
    classes = [actor_class(each) for each in operators_of({"sa1b": recipe_of(config, "sa1b")}, config)]
    models = ["caption", "extract_category", "agree_with_segmenter"]
    assert [each.__name__ for each in classes] == ["source", *models, "write"]
    sent = cloudpickle.loads(cloudpickle.dumps(classes[1]))
    assert sent.__name__ == "caption" and issubclass(sent, Workers)

    shared = config_of(tmp_path / "out", sa1b=sa1b)
    [operator] = operators_of({"sa1b": recipe_of(shared, "sa1b")}, shared)
    assert actor_class(operator).__name__ == "+".join(models)


def two_captioners(tmp_path, num_gpus: float) -> BuildConfig:
    """Two captioners in a fallback, each on GPUs, and a vote of two judges on the CPU."""
    first = recipe_tests.captioner(tmp_path, "first")
    second = recipe_tests.captioner(tmp_path, "second")
    for entry in (first, second):
        entry["captioner"] |= {"num_gpus": num_gpus}
    votes = [recipe_tests.judge(tmp_path, name, "cat") for name in ("one", "two")]
    return recipe_tests.configured(tmp_path, {"fallback": [first, second]}, {"vote": votes})


def test_each_member_on_gpus_has_a_pool_and_those_without_share_one(tmp_path):
    config = two_captioners(tmp_path, 0.5)
    pools = find_pools(config, ["coconut"])
    assert [pool.stages["coconut"] for pool in pools] == [
        ("source",),
        ("first",),
        ("second",),
        ("fallback", "one", "two", "vote", "write"),
    ]
    assert [pool.places for pool in pools][1] == ("subsets.coconut.recipe.first.captioner",)


@pytest.fixture
def cluster(ray_init, monkeypatch):
    """Stands in for a cluster of 8 CPUs and one GPU; what is changed in it is what the cluster has."""
    import ray

    has = {"CPU": 8.0, "GPU": 1.0}
    monkeypatch.delenv("RAY_AUTOSCALER", raising=False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: has)
    return has


def test_more_pools_than_gpus_are_refused_with_what_helps(tmp_path, cluster):
    shares = two_captioners(tmp_path / "shares", 0.5)
    assert RayEngine().group(shares, ["coconut"]) == [["coconut"]]
    whole = two_captioners(tmp_path / "whole", 1)
    with pytest.raises(ConfigError) as refused:
        RayEngine().group(whole, ["coconut"])
    for words in ("2 GPU at once", "first: 1 x 1", "second: 1 x 1", "num_gpus: 0.5", "one model a pass"):
        assert words in str(refused.value)


def two_subsets(tmp_path, coconut, sa1b) -> BuildConfig:
    """Two subsets that share nothing but the judge: together their pools need three GPUs, each alone two."""
    own = recipe_tests.captioner(tmp_path, "own")
    own["captioner"] |= {"num_gpus": 1}
    values = config_of(tmp_path / "out", coconut=coconut, sa1b=sa1b).model_dump(mode="json")
    values["captioner"]["num_gpus"] = values["judge"]["num_gpus"] = 1
    values["subsets"]["sa1b"]["recipe"] = [own, "extract_category"]
    return BuildConfig.model_validate(values)


def test_subsets_run_side_by_side_where_their_pools_fit_and_else_a_line_says_that_they_do_not(
    tmp_path, coconut, sa1b, cluster, caplog
):
    config, both = two_subsets(tmp_path, coconut, sa1b), ["coconut", "sa1b"]
    cluster["GPU"] = 3.0
    with caplog.at_level(logging.INFO):
        assert RayEngine().group(config, both) == [both]
        assert not caplog.records
        cluster["GPU"] = 2.0
        assert RayEngine().group(config, both) == [["coconut"], ["sa1b"]]
    (line,) = [each.message for each in caplog.records]
    assert line == (
        "built one after the other: coconut, then sa1b; all at once need 3 GPU, the cluster has 2"
    )


def test_a_cluster_that_scales_itself_has_what_the_largest_subset_needs(
    tmp_path, coconut, sa1b, cluster, monkeypatch
):
    cluster["GPU"] = 0.0
    config = two_subsets(tmp_path, coconut, sa1b)
    monkeypatch.setenv("RAY_AUTOSCALER", "yes")
    assert RayEngine().group(config, ["coconut", "sa1b"]) == [["coconut"], ["sa1b"]]
    shared = BuildConfig.model_validate(
        config.model_dump(mode="json") | {"subsets": config_of(tmp_path, coconut=coconut, sa1b=sa1b).subsets}
    )
    assert RayEngine().group(shared, ["coconut", "sa1b"]) == [["coconut", "sa1b"]]


@pytest.fixture
def counted(monkeypatch):
    """Stands in for Ray's counters: the sum of each, by name and tags."""
    sums: dict[tuple, float] = {}

    def increase(name: str):
        _, tags = COUNTERS[name]

        def inc(value: float, given: dict[str, str]) -> None:
            assert value > 0 and set(given) == set(tags)
            key = (name.removeprefix("paracaption_"), *given.values())
            sums[key] = sums.get(key, 0) + value

        return inc

    monkeypatch.setattr(ray_metrics, "_increase", increase)
    return sums


def test_events_and_units_are_counted(counted):
    metrics = RayMetrics("coconut")
    metrics.count_event(Event(0.0, "ready", stage="caption", seconds=3.0))
    metrics.count_event(Event(0.0, "started", stage="caption", seconds=3.0))
    for asked in (5, 0):
        unit = Event(0.0, "unit", stage="caption", images=2, regions=7, asked=asked, seconds=1.5, busy=1.0)
        metrics.count_event(unit)
    metrics.count_event(Event(0.0, "failed", stage="caption", detail="no"))
    assert counted == {
        ("stage_starts", "coconut", "caption"): 1,
        ("stage_units", "coconut", "caption"): 2,
        ("stage_images", "coconut", "caption"): 4,
        ("stage_regions", "coconut", "caption"): 14,
        ("stage_asked", "coconut", "caption"): 5,
        ("stage_seconds", "coconut", "caption"): 3.0,
        ("stage_busy_seconds", "coconut", "caption"): 2.0,
        ("stage_failures", "coconut", "caption"): 1,
    }
    counted.clear()
    entry = FileEntry("a", 1, "0" * 64)
    dropped = {"caption/not_words": 3, "clean_text/too_long": 1}
    metrics.count_unit(Manifest("u", "coconut", "p", "r", None, entry, {"1": 2, "2": 0}, 6, 2, dropped, {}))
    assert counted == {
        ("units", "coconut"): 1,
        ("images", "coconut"): 2,
        ("regions_kept", "coconut"): 2,
        ("regions_dropped", "coconut", "caption/not_words"): 3,
        ("regions_dropped", "coconut", "clean_text/too_long"): 1,
    }


def test_a_metric_that_fails_is_said_once_and_costs_no_unit(monkeypatch, caplog):
    monkeypatch.setattr(ray_metrics, "_increase", lambda name: 1 / 0)
    metrics = RayMetrics("coconut")
    for _ in range(3):
        metrics.count_event(Event(0.0, "unit", stage="caption", images=1))
    assert len(caplog.records) == 1
