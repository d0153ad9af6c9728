"""Tensors go to a device without a wait, and come back for one."""

import torch

from paracaption.pipeline.io.transfers import download, upload
from tests.device import pretend


def test_uploads_do_not_wait_and_a_download_waits_once_for_all():
    near = [torch.arange(6.0).view(2, 3), torch.tensor([True, False]), torch.tensor(7), torch.zeros(0, 4)]
    with pretend() as device:
        with device.counting() as counts:
            far = [upload(each, device.name) for each in near]
            assert (counts.syncs, counts.uploads) == (0, 0), counts.waits()
            assert {each.device.type for each in far} == {device.name}
            found = download(far)
            assert (counts.syncs, counts.uploads) == (1, 0), counts.waits()
    for there, here in zip(found, near, strict=True):
        assert there.device.type == "cpu"
        assert there.dtype == here.dtype
        assert torch.equal(there, here)


def test_what_is_on_the_host_stays_as_it_is():
    near = [torch.ones(3), torch.zeros(2)]
    assert all(found is each for found, each in zip(download(near), near, strict=True))
    assert download([]) == []
    assert upload(near[0], "cpu") is near[0]
