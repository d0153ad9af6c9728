"""What a run's events say about the model stages: added up, and from a worker without Ray."""

import os
import time

import pytest

from paracaption.pipeline.corpus import utilization
from paracaption.pipeline.corpus.events import Event, EventLog
from paracaption.pipeline.corpus.utilization import UtilizationCounter
from paracaption.pipeline.executor import gpus
from paracaption.pipeline.stages import recipes
from tests.building import config_of
from tests.pipeline.executor.test_worker import NUM_IMAGES, Bench
from tests.synthetic import write_coconut

HAS_GPU = os.path.exists("/dev/nvidia0")


@pytest.fixture(scope="module")
def coconut(tmp_path_factory):
    return write_coconut(tmp_path_factory.mktemp("source") / "coconut", num_images=NUM_IMAGES)


def added(*events: tuple[str, Event]) -> UtilizationCounter:
    found = UtilizationCounter()
    for worker, event in events:
        found.add(worker, event)
    return found


def test_busy_share_is_time_in_calls_over_the_actors_life():
    found = added(
        ("a", Event(99, "started", "caption", seconds=20)),
        ("a", Event(100, "ready", "caption+verify")),
        ("b", Event(109, "started", "caption", seconds=40)),
        ("b", Event(110, "ready", "caption+verify")),
        ("a", Event(115, "unit", "caption", "u0", regions=30, asked=30, seconds=13, busy=12, gpu=0.5)),
        ("b", Event(120, "unit", "caption", "u1", regions=10, asked=6, seconds=5, busy=4, gpu=0.9)),
    ).stages()["caption"]
    assert (found.actors, found.startup_s, found.asked) == (2, 30, 36)
    assert found.alive_s == 20 + 10
    assert found.busy_share == pytest.approx(16 / 30)
    assert found.regions_per_s == pytest.approx(36 / 16)
    assert found.gpu == pytest.approx((0.5 * 12 + 0.9 * 4) / 16)


def test_a_stage_without_a_model_or_work_has_no_shares():
    found = added(
        ("w", Event(5, "ready", "source")),
        ("c", Event(6, "started", "caption", seconds=1)),
        ("w", Event(9, "unit", "source", "u0", regions=3, seconds=1)),
    ).stages()
    assert list(found) == ["caption"]
    assert (found["caption"].busy_share, found["caption"].regions_per_s, found["caption"].gpu) == (
        None,
        None,
        None,
    )


def test_of_the_backends_numbers_the_last_of_each_actor_count():
    found = added(
        ("a", Event(1, "started", "judge")),
        ("a", Event(2, "unit", "judge", "u0", report={"hit rate": 0.1})),
        ("a", Event(3, "unit", "judge", "u1", report={"hit rate": 0.6})),
        ("b", Event(3, "unit", "judge", "u2", report={"hit rate": 0.8, "other": 1.0})),
    )
    assert found.stages()["judge"].report == pytest.approx({"hit rate": 0.7, "other": 1.0})


def test_the_time_in_which_an_actor_worked_for_another_subset_is_no_idle_time():
    found = added(
        ("a", Event(0, "started", "caption")),
        ("a", Event(0, "ready", "caption")),
        ("a", Event(6, "unit", "caption", "u0", asked=4, busy=2.0, away=4.0)),
        ("a", Event(10, "unit", "caption", "u1", asked=4, busy=2.0, away=1.0)),
        ("b", Event(0, "ready", "caption")),
        ("b", Event(10, "unit", "caption", "u2", asked=4, busy=10.0)),
    )
    assert found.stages()["caption"].alive_s == pytest.approx((10 - 5) + 10)
    assert found.stages()["caption"].busy_share == pytest.approx(14 / 15)


def test_runs_of_a_subset_are_added_up_and_those_of_another_left_out(tmp_path):
    for run, seconds in (("1-1-coconut-a", 2.0), ("2-1-coconut-b", 4.0), ("3-1-coconut-l-c", 9.0)):
        folder = tmp_path / "events" / run
        folder.mkdir(parents=True)
        log = EventLog(folder, "caption")
        log.emit("started", stage="caption", seconds=seconds)
        log.emit("ready", stage="caption")
        log.emit("unit", stage="caption", unit="u", asked=5, busy=seconds)
    found = utilization.read_utilization(tmp_path, "coconut")["caption"]
    assert (found.asked, found.busy_s, found.startup_s, found.actors) == (10, 6.0, 3.0, 1)
    assert utilization.read_utilization(tmp_path / "none", "coconut") == {}


def test_a_worker_tells_the_time_in_calls_the_cpu_time_and_what_its_backend_reports(tmp_path, coconut):
    bench = Bench(tmp_path, coconut, captioner={"delay_s": 0.05})
    judge = bench.config.judge.model_copy(update={"name": "tests.odd_backends:ReportingJudge", "options": {}})
    bench.config = bench.config.model_copy(update={"judge": judge})
    bench.stages = recipes.recipe_of(bench.config, "coconut")
    bench.draft()
    told = {event.stage: event for event in bench.events("unit")}
    assert NUM_IMAGES * 0.05 <= told["caption"].busy <= told["caption"].seconds
    assert told["caption"].cpu < told["caption"].busy  # it slept
    assert 0 < told["source"].cpu and told["source"].busy == 0
    assert told["caption"].gpu is None and told["caption"].report == {}
    assert told["verify_category"].report == {"questions": 4.0 * NUM_IMAGES}


def test_a_report_that_fails_costs_no_unit(tmp_path, coconut):
    bench = Bench(tmp_path, coconut)
    judge = bench.config.judge.model_copy(
        update={"name": "tests.odd_backends:ReportingJudge", "options": {"broken": True}}
    )
    bench.config = bench.config.model_copy(update={"judge": judge})
    bench.stages = recipes.recipe_of(bench.config, "coconut")
    assert bench.draft().manifest.kept == 24


# The GPU's utilization.


class Driver:
    """Stands for the driver's library: `util` percent, or an error as a slice of a GPU gives."""

    class NVMLError(Exception):
        pass

    def __init__(self, util):
        self.util, self.asked = util, []

    def nvmlDeviceGetCount(self):
        return 4

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, name):
        return name

    def nvmlDeviceGetUtilizationRates(self, handle):
        self.asked.append(handle)
        if self.util is None:
            raise self.NVMLError("not supported")
        return type("Rates", (), {"gpu": self.util})


def metered(monkeypatch, driver, visible, seconds=0.1):
    monkeypatch.setattr(gpus, "_start_nvml", lambda: driver)
    monkeypatch.setattr(gpus, "SAMPLE_EVERY_S", 0.01)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    meter = gpus.Meter(has_gpu=True)
    with meter.call():
        time.sleep(seconds)
    return meter.take()


def test_utilization_is_sampled_on_the_actors_own_gpus_during_calls(monkeypatch):
    driver = Driver(80)
    spent = metered(monkeypatch, driver, "2,GPU-7f")
    assert spent.gpu == pytest.approx(0.8) and spent.busy_s >= 0.1
    assert set(driver.asked) == {2, "GPU-7f"}


def test_a_driver_that_does_not_know_is_asked_once_and_the_share_is_unknown(monkeypatch):
    driver = Driver(None)
    assert metered(monkeypatch, driver, "0").gpu is None
    assert driver.asked == [0]


def test_between_calls_nothing_is_sampled_and_nothing_is_counted_twice(monkeypatch):
    driver = Driver(50)
    monkeypatch.setattr(gpus, "_start_nvml", lambda: driver)
    monkeypatch.setattr(gpus, "SAMPLE_EVERY_S", 0.01)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    meter = gpus.Meter(has_gpu=True)
    time.sleep(0.1)
    assert driver.asked == []
    with meter.call():
        pass
    assert meter.take().busy_s > 0
    assert meter.take() == gpus.Spent(0.0, None)


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_without_a_driver_there_are_no_gpus_and_the_share_is_unknown():
    assert gpus.list_gpus() == []
    meter = gpus.Meter(has_gpu=True)
    with meter.call():
        time.sleep(0.01)
    spent = meter.take()
    assert spent.gpu is None and spent.busy_s >= 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no GPU here")
def test_a_busy_gpu_is_seen_busy():
    import torch

    (first, *_) = gpus.list_gpus()
    assert first.total_bytes > 1e9
    meter = gpus.Meter(has_gpu=True)
    square = torch.ones(8192, 8192, device="cuda")
    with meter.call():
        end = time.monotonic() + 4
        while time.monotonic() < end:
            (square @ square).sum().item()
    spent = meter.take()
    assert spent.gpu is not None and spent.gpu > 0.5


def test_a_configuration_that_would_publish_a_secret_is_refused(tmp_path, coconut):
    with pytest.raises(ValueError, match=r"OPENAI_API_KEY looks like a secret"):
        config = config_of(tmp_path / "out", coconut=coconut).model_dump()
        config["judge"]["runtime_env"] = {"env_vars": {"OPENAI_API_KEY": "x"}}
        type(config_of(tmp_path / "out", coconut=coconut)).model_validate(config)
