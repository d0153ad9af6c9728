"""How often training waits: for the device within a micro-batch, and for other ranks within a step."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from paracaption.model_training.train import distributed, metrics
from paracaption.model_training.train.distill import draw_path_state, path_loss
from paracaption.model_training.train.trainer import fit
from paracaption.schemas.distillation import Distillation
from paracaption.schemas.training import NoiseOptions
from tests.device import pretend
from tests.model_training import ranks
from tests.model_training.tiny_models import lively, photo
from tests.model_training.toy_corpus import config_of
from tests.model_training.train.test_loss import train_batch

BATCHES, STEPS = 2, 3
PER_BATCH, PER_STEP = 1, 2
"""Synchronizations: a batch asks whether its places fit its features; a step reads its loss and its norm."""


def run_of(folder, corpus, **changes):
    return config_of(folder, corpus, steps=STEPS, gradient_accumulation_steps=BATCHES, **changes)


def assert_same_course(one, other):
    """The same losses and weights, but for the order of sums."""
    for here, there in zip(metrics.read_metrics(one), metrics.read_metrics(other), strict=True):
        assert here["samples"] == there["samples"]
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)
        assert here["norm"] == pytest.approx(there["norm"], rel=1e-4)
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("noise", [{}, {"loss_weighting": "none", "level": "region"}])
@pytest.mark.soak(keep=1)
def test_a_micro_batch_waits_once_for_its_device(corpus, tmp_path, monkeypatch, noise):
    fit(run_of(tmp_path / "cpu", corpus, noise=noise, ema_decay=0.9))
    waited = []
    with pretend() as device, device.counting() as counts:
        monkeypatch.setattr(distributed, "_choose_device", lambda _: torch.device(device.name))

        def note(_):
            waited.append((counts.syncs, counts.uploads, counts.waits()))
            counts.events.clear()

        fit(run_of(tmp_path / "device", corpus, noise=noise, ema_decay=0.9), report=note)
    for syncs, uploads, where in waited[1:]:  # before the first step, weights go to the device
        assert syncs == BATCHES * PER_BATCH + PER_STEP, where
        assert uploads == 0, where
    assert_same_course(tmp_path / "cpu", tmp_path / "device")


def test_a_micro_batch_of_distillation_waits_once_too():
    model, processor = lively(dtype=torch.float32)
    captions = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    batch = train_batch(*[processor.make_example(*photo(seed, 3), captions) for seed in range(2)])
    steps_BL = (torch.arange(batch.label_BL.numel()) % 4).view_as(batch.label_BL)
    batch = batch._replace(path_step_BL=steps_BL.masked_fill(~batch.label_BL, -1))
    state = draw_path_state(batch, NoiseOptions(), 4, torch.Generator().manual_seed(1))
    assert state.learned_BL.any()

    def gradient_of_loss():
        found = path_loss(model, batch, state, Distillation(paths="paths"))
        model.zero_grad()
        found.mean.backward()
        return found.mean.detach(), model.lm_head.weight.grad

    expected = gradient_of_loss()
    with pretend() as device:
        model.to(device.name)
        with device.counting() as counts:
            found = gradient_of_loss()
        found = [each.cpu() for each in found]
    assert counts.syncs == PER_BATCH, counts.waits()
    assert counts.uploads == 0, counts.waits()
    torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-6)


@pytest.fixture
def sums(monkeypatch) -> list[int]:
    """Gets an item whenever FSDP2 sums gradients over the ranks."""
    sum_up, sums = _fsdp_param_group.foreach_reduce, []

    def counted(*args, **named):
        sums.append(1)
        return sum_up(*args, **named)

    monkeypatch.setattr(_fsdp_param_group, "foreach_reduce", counted)
    return sums


@pytest.mark.soak
def test_a_sharded_model_sums_gradients_once_a_step_and_learns_the_same(corpus, tmp_path, monkeypatch, sums):
    fit(run_of(tmp_path / "batch", corpus, shard="full"))
    after_each = len(sums)
    sums.clear()
    monkeypatch.setattr(distributed, "sums_once_a_step", lambda *_: True)  # as with other ranks
    fit(run_of(tmp_path / "step", corpus, shard="full"))
    assert after_each == len(sums) * BATCHES
    assert len(sums) % STEPS == 0 < len(sums)  # the layers, whose gradients are summed apart
    assert_same_course(tmp_path / "step", tmp_path / "batch")


@pytest.mark.soak
def test_two_ranks_that_sum_gradients_once_a_step_learn_the_same(corpus, tmp_path):
    for name, each_batch in (("step", False), ("batch", True)):
        config = run_of(tmp_path / name, corpus, shard="full", sync_each_batch=each_batch)
        assert ranks.run(config, 2) == [0, 0]
    assert_same_course(tmp_path / "step", tmp_path / "batch")


@pytest.mark.parametrize(
    ("share", "changes", "once"),
    [
        (0.9, {}, True),
        (1.1, {}, False),
        (1.1, {"sync_each_batch": False}, True),
        (0.9, {"sync_each_batch": True}, False),
        (0.9, {"world_size": 1}, False),
        (0.9, {"sharded": False}, False),
        (0.9, {"gradient_accumulation_steps": 1}, False),
    ],
)
def test_gradients_wait_for_the_end_of_a_step_where_there_is_room_for_them(
    corpus, tmp_path, monkeypatch, share, changes, once
):
    weight = torch.nn.Parameter(torch.zeros(100))
    monkeypatch.setattr(distributed, "_memory_bytes", lambda _: 1600 / share)
    ours = {"world_size": changes.pop("world_size", 2), "sharded": changes.pop("sharded", True)}
    # Another rank has more memory; all ranks go by the least.
    group = SimpleNamespace(device=torch.device("cpu"), all_gather=lambda own: [2 * own, own], **ours)
    config = run_of(tmp_path, corpus).model_copy(update=changes)
    assert distributed.sums_once_a_step([weight], group, config) == once
