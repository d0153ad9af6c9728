"""Data that is left out: a run on nothing fails, as does one on less than is allowed."""

from __future__ import annotations

import json

import pytest

from paracaption.model_training.train import metrics, trainer
from paracaption.model_training.train.distributed import DistributedGroup
from paracaption.model_training.train.dropped import DropCounts
from paracaption.model_training.train.trainer import fit
from paracaption.schemas.errors import StageFailed
from tests.model_training.toy_corpus import config_of


def DATA(corpus):
    return {"max_tokens": 256, "workers": 0, "cache": str(corpus.parent / "cache")}


@pytest.fixture
def short(corpus, tmp_path):
    """Writes conversations of which the first photos are cut short, and returns them as a source."""
    photos = sorted((corpus.parent / "photos").iterdir())

    def write(number, damaged):
        folder = tmp_path / "photos"
        folder.mkdir()
        turns = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "a small red ring"},
        ]
        records = []
        for index, path in enumerate(photos[:number]):
            data = path.read_bytes()
            (folder / path.name).write_bytes(data[: len(data) // 3] if index < damaged else data)
            records.append({"id": path.stem, "image": path.name, "conversations": turns})
        (tmp_path / "records.json").write_text(json.dumps(records))
        return {"path": str(tmp_path / "records.json"), "images": str(folder)}

    return write


def on_short(corpus, tmp_path, source, share=0.5, **changes):
    data = DATA(corpus) | {"on_bad_sample": "skip", "max_examples": 1, "max_dropped_share": share}
    values = {"corpora": [], "conversations": [source], "data": data, "steps": None, "epochs": 1}
    return config_of(tmp_path / "run", corpus, **values | changes)


@pytest.mark.parametrize("share", [0.5, 1.0, None])
@pytest.mark.parametrize("length", [{"steps": None, "epochs": 2}, {"steps": 3, "epochs": None}])
@pytest.mark.soak
def test_a_run_on_photos_that_cannot_be_read_fails_and_writes_no_model(
    corpus, tmp_path, short, share, length
):
    config = on_short(corpus, tmp_path, short(4, 4), share, **length)
    with pytest.raises(StageFailed, match=r"left out.*on_bad_sample"):
        fit(config)
    assert not (tmp_path / "run/model").exists()
    with pytest.raises(StageFailed):  # and does not succeed when it is run again
        fit(config)


@pytest.mark.parametrize(
    "steps",
    [{"steps": None, "epochs": 1}, pytest.param({"steps": 8, "epochs": None}, marks=pytest.mark.soak)],
)
@pytest.mark.soak
def test_a_run_stops_when_more_than_the_allowed_share_of_an_epoch_is_left_out(corpus, tmp_path, short, steps):
    source = short(8, 3)
    with pytest.raises(
        StageFailed, match=r"3 of the first \d items were left out.*max_dropped_share \(0\.25\)"
    ):
        fit(on_short(corpus, tmp_path, source, 0.25, **steps))
    assert not (tmp_path / "run/model").exists()
    outcome = fit(on_short(corpus, tmp_path / "more", source, 0.375, **steps))
    records = metrics.read_metrics(outcome.model.parent)
    assert [sum(record[name] for record in records) for name in ("examples", "dropped")] == [5, 3]


@pytest.mark.soak
def test_the_share_is_counted_on_after_a_resume(corpus, tmp_path, short, monkeypatch):
    config = on_short(corpus, tmp_path, short(8, 3), 0.25, checkpoint={"every": 1})
    real, taken = trainer._check_data, []

    def killed_twice(*given):
        taken.append(1)
        if len(taken) in (2, 5):
            raise KeyboardInterrupt
        real(*given)

    monkeypatch.setattr(trainer, "_check_data", killed_twice)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    with pytest.raises(StageFailed, match=r"3 of the first \d items were left out"):
        fit(config)


@pytest.mark.soak
def test_a_step_without_an_example_is_not_taken(corpus, tmp_path, short):
    config = on_short(corpus, tmp_path, short(6, 4), 1.0, ema_decay=0.9, weight_decay=0.1)
    outcome = fit(config)
    records = metrics.read_metrics(tmp_path / "run")
    assert [("why" in record) for record in records] == [record["examples"] == 0 for record in records]
    assert outcome.skipped == 4, "four in all, however many in a row"


def test_counts_of_a_checkpoint_of_an_earlier_release_begin_where_it_ends():
    counts = DropCounts.restored(None, 3)
    counts.add(3, 2, 0)
    counts.check_epoch(0.5)  # what came before in this epoch is unknown
    counts.check_run(0.5)
    counts.add(4, 2, 0)
    with pytest.raises(StageFailed, match="epoch 4: all of its 2 items"):
        counts.check_epoch(None)


def test_the_allowed_share_is_no_part_of_what_identifies_the_data(corpus, tmp_path):
    configs = [config_of(tmp_path, corpus, data=DATA(corpus) | {"max_dropped_share": x}) for x in (0.1, None)]
    group = DistributedGroup(configs[0], 0, 1)
    runs = [trainer.Run(config, group) for config in configs]
    assert len({run.loader.fingerprint for run in runs}) == 1
    for run in runs:
        run.close()
