"""Sources that are damaged by chance; see `damaged`. In `make soak` some of 2,000 seeds (tests/seeds.py)."""

import logging

import pytest

from paracaption.pipeline.executor import audit
from paracaption.pipeline.sources import protocols
from tests.cases import damaged
from tests.cases.damaged import problem_of_seed
from tests.seeds import some


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def try_seeds(seeds: range) -> None:
    problems = [found for seed in seeds if (found := problem_of_seed(seed))]
    assert not problems, f"{len(problems)} of {len(seeds)} seeds:\n" + "\n".join(problems[:5])


@pytest.mark.soak
def test_thirty_damaged_sources_are_read_rightly_or_dropped_with_a_reason():
    try_seeds(range(30))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_damaged_sources():
    try_seeds(some(range(2000)))


def runs_of(kind, folder):
    for seed in range(6):
        (folder / str(seed)).mkdir()
    return [kind(seed, folder / str(seed)).run() for seed in range(6)]


class Untouched(damaged.Run):
    """A source without any damage."""

    def _damage(self) -> None:
        pass


def mixed_up(image):
    """Two regions have each other's mask."""
    live = image.live()
    if len(live) > 1:
        first, second = live[:2]
        first.rle, second.rle = second.rle, first.rle
        first.area, second.area = second.area, first.area
        first.bbox, second.bbox = second.bbox, first.bbox


def left_out(image):
    """The last region is in no record."""
    del image.regions[-1:]


class BrokenInside(damaged.Run):
    """Every photo breaks in its middle; its header and its end are whole."""

    def _damage(self) -> None:
        for path in self.made.files(".jpg", ".png"):
            data = path.read_bytes()
            if not path.is_relative_to(self.made.root / "labels"):
                path.write_bytes(data[: len(data) // 2] + bytes(40) + data[len(data) // 2 + 40 :])


@pytest.mark.parametrize(
    ("wrong", "noticed"),
    [(None, ""), (mixed_up, "another mask"), (left_out, "regions in the files")],
)
@pytest.mark.soak
def test_a_reader_that_does_wrong_is_noticed(monkeypatch, tmp_path, wrong, noticed):
    read = protocols.Source.read

    def wrongly(self, *args, **kwargs):
        image = read(self, *args, **kwargs)
        if wrong is not None:
            wrong(image)
        return image

    monkeypatch.setattr(protocols.Source, "read", wrongly)
    found = runs_of(Untouched, tmp_path)
    assert any(found) is bool(noticed) and all(noticed in each for each in found if each)


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.soak
def test_an_audit_that_does_not_look_inside_photos_is_noticed(monkeypatch, tmp_path, looks):
    if not looks:
        monkeypatch.setattr(audit, "_check_pixels", lambda _image, _limits: None)
    found = runs_of(BrokenInside, tmp_path)
    assert any("usable, ledger" in each for each in found) is not looks
