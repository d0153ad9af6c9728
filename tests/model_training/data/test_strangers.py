"""A stranger's corpus leads training out of its folder no more than it leads a reader."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from paracaption.pipeline.io import confined
from paracaption.schemas.errors import ParaCaptionError
from tests.model_training.corpora import loader
from tests.pipeline.explorer import strangers

CORPORA = {
    name: strangers.CORPORA[name]
    for name in strangers.CORPORA
    if not name.startswith(("work_list_", "ledger_with", "mask_of", "link_as_coconut_plan", "link_as_plots"))
    and name not in ("link_as_review", "link_as_report.html", "link_as_README.md", "link_as_beat")
}
"""Those whose files training reads."""
QUICK = ["ledger_names_shard_by_dots", "manifest_names_shard_elsewhere", "sample_with_a_path_as_key"]
QUICK += ["link_as_coconut_shards", "link_as_coconut_ledger", "pipe_as_manifest", "shard_with_a_link"]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    from tests.model_training.toy_corpus import write_merged

    return write_merged(tmp_path_factory.mktemp("good") / "world", 6)


def taken(good: Path, folder: Path, name: str) -> tuple[Path, Path]:
    """A hostile copy of a corpus, and the folder beside it that must not be opened."""
    work, outside = folder / "out", folder / "outside"
    shutil.copytree(good, work)
    for kind in ("log", "beat"):
        (work / kind).mkdir(exist_ok=True)
    strangers.lay_out(outside, work)
    strangers.CORPORA[name](work, outside)
    return work, outside


def read(work: Path) -> None:
    with suppress(ParaCaptionError):
        for _ in loader(work, max_tokens=4_000):
            pass


def is_led_out(seen: list[tuple[str, str]], work: Path) -> list[tuple[str, str]]:
    base, ours = os.path.realpath(work.parent), os.path.realpath(work)
    cache = os.path.realpath(work.parent / "cache")
    opened = [each for each in seen if each[0] not in ("inotify", "socket.connect")]
    reals = [(event, os.path.realpath(path)) for event, path in opened]
    out = [each for each in reals if confined.is_below(each[1], base)]
    inside = [each for each in out if confined.is_below(each[1], ours, cache) or each[1] == base]
    return [each for each in out if each not in inside] + [each for each in seen if each[0] == "inotify"]


@pytest.mark.parametrize(
    "name", [each if each in QUICK else pytest.param(each, marks=pytest.mark.soak) for each in CORPORA]
)
def test_training_opens_nothing_that_is_not_the_corpus_s(good, tmp_path, name):
    work, outside = taken(good, tmp_path, name)
    with strangers.watched(outside) as seen:
        read(work)
    assert is_led_out(seen, work) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.soak
def test_a_link_that_appears_while_the_workers_read_is_not_followed(good, tmp_path, method):
    work, outside = taken(good, tmp_path, "link_as_review")
    ours = loader(work, max_tokens=4_000, workers=1, start_method=method)
    shards = work / "coconut/shards"
    shards.rename(tmp_path / "moved")
    (outside / "shards").mkdir()
    for path in (tmp_path / "moved").iterdir():
        shutil.copy(path, outside / "shards")
    shards.symlink_to(outside / "shards")
    with strangers.watched(outside) as seen, pytest.raises(ParaCaptionError, match="leads out of the corpus"):
        list(ours)
    assert not [each for each in seen if each[0] == "inotify" and "tar" in each[1]]


def test_a_corpus_that_is_sent_to_another_process_is_confined_there(good, tmp_path):
    import pickle

    from paracaption.pipeline.corpus import reader
    from paracaption.schemas.errors import IntegrityError

    work = shutil.copytree(good, tmp_path / "out")
    opened = reader.open_corpus(work)
    (tmp_path / "elsewhere.json").write_text("{}")
    (work / "link.json").symlink_to(tmp_path / "elsewhere.json")
    sent = pickle.dumps(opened)
    confined._CONFINED.pop(str(work))
    pickle.loads(sent)
    with pytest.raises(IntegrityError, match="leads out of the corpus"):
        confined.check(work / "link.json")
