"""The device that pretends: it refuses, counts and delays as a GPU does, and its numbers are the CPU's."""

import pytest
import torch
from torch.nn import functional

from tests.device import pretend


@pytest.fixture
def device():
    with pretend() as device:
        yield device


def counted(device, function):
    with device.counting() as counts:
        function()
    return counts.syncs, counts.uploads, counts.launches


def test_numbers_are_those_of_the_cpu_and_stay_on_the_device(device):
    x = torch.randn(3, 4)
    far = x.to("pretend")
    assert far.device.type == "pretend"
    assert not far.is_cpu
    expected = ((x @ x.T).softmax(-1) + 1)[1:]
    found = ((far @ far.T).softmax(-1) + 1)[1:]
    assert found.device.type == "pretend"
    assert torch.equal(found.cpu(), expected)


def test_views_share_memory_and_what_is_written_in_place_stays_the_same_tensor(device):
    far = torch.zeros(2, 3, device="pretend")
    row = far[1]
    assert row.add_(5) is row
    row[2] = 7
    assert far.tolist() == [[0, 0, 0], [5, 5, 7]]


def test_devices_do_not_mix_but_for_single_numbers(device):
    far, near = torch.ones(3, device="pretend"), torch.ones(3)
    for wrong in (
        lambda: far + near,
        lambda: near + far,
        lambda: torch.cat([far, near]),
        lambda: torch.where(far > 0, far, near),
        lambda: near[far > 0],
    ):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    assert (far + torch.tensor(2.0)).tolist() == [3, 3, 3]
    with pytest.raises(RuntimeError, match="same device"):
        torch.tensor(2.0) + near[0].to("pretend") + near


WAITS = {
    "a number that the host reads": (lambda x: x[0].item(), 1),
    "a condition": (lambda x: bool(x.any()), 1),
    "a list": (lambda x: x.tolist(), 1),
    "a copy to the host": (lambda x: x.cpu(), 1),
    "positions": (lambda x: x.nonzero(), 1),
    "indexing by a mask": (lambda x: x[x > 1], 1),
    "writing at a mask": (lambda x: x.__setitem__(x > 1, x[x > 1]), 2),
    "filling a mask": (lambda x: x.__setitem__(x > 1, 0.0), 0),
    "masked_fill": (lambda x: x.masked_fill(x > 1, 0), 0),
    "counting": (lambda x: x.long().bincount(), 1),
    "different values": (lambda x: x.unique(), 1),
    "equality": (lambda x: torch.equal(x, x), 1),
    "sorting and gathering": (lambda x: x.gather(0, x.argsort(stable=True)), 0),
}


@pytest.mark.parametrize(("what", "waits"), WAITS.values(), ids=WAITS)
@pytest.mark.parametrize("inference", [False, True])
def test_waiting_is_counted(device, what, waits, inference):
    x = torch.arange(4.0, device="pretend")
    with torch.inference_mode(inference):
        assert counted(device, lambda: what(x))[0] == waits


def test_copies_to_the_device_are_uploads_unless_they_do_not_wait(device):
    near = torch.arange(3)
    far = near.to("pretend")
    for copy, expected in (
        (lambda: near.to("pretend"), 1),
        (lambda: torch.tensor([1, 2], device="pretend"), 1),
        (lambda: far.copy_(near), 1),
        (lambda: far[near], 1),
        (lambda: far[[0, 2]], 1),
        (lambda: near.to("pretend", non_blocking=True), 0),
        (lambda: far.copy_(near, non_blocking=True), 0),
        (lambda: torch.zeros(3, device="pretend"), 0),
        (lambda: far.to(torch.float64), 0),
    ):
        assert counted(device, copy)[:2] == (0, expected)


def test_a_launch_is_an_operation_that_makes_more_than_a_view(device):
    x = torch.randn(1, 2, 4, 8, device="pretend")
    assert counted(device, lambda: x[0].transpose(1, 2).unsqueeze(0).expand(2, -1, -1, -1).detach())[2] == 0
    assert counted(device, lambda: (x + 1).exp_())[2] == 2
    assert counted(device, lambda: functional.scaled_dot_product_attention(x, x, x))[2] == 1
    assert counted(device, lambda: functional.rms_norm(x, (8,)))[2] == 1
    assert counted(device, lambda: functional.linear(x[0, 0], x[0, 0]))[2] == 1


def test_a_copy_that_nobody_waited_for_is_nonsense(device):
    far, near = torch.arange(4, device="pretend"), torch.zeros(4, dtype=torch.int64)
    with device.counting() as counts:
        near.copy_(far, non_blocking=True)
        late = torch.get_device_module("pretend").Event()
        late.record()
        assert near.tolist() != far.host_value.tolist()
        assert counts.syncs == 0
        late.synchronize()
        assert near.tolist() == [0, 1, 2, 3]
        assert counts.syncs == 1


def test_gradients_are_those_of_the_cpu(device):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
    layer(x).square().sum().backward()
    expected = layer.weight.grad
    layer.zero_grad()
    layer.to("pretend")
    with device.counting() as counts:
        layer(x.to("pretend", non_blocking=True)).square().sum().backward()
    assert counts.syncs == counts.uploads == 0, counts.waits()
    assert torch.allclose(layer.weight.grad.cpu(), expected)


def test_outside_of_its_context_there_is_no_such_device():
    with pretend():
        x = torch.ones(2, device="pretend")
    with pytest.raises(RuntimeError, match="within `pretend"):
        x + 1
    assert not torch.accelerator.is_available()
