"""Artifacts are made beside the work: no server, slow or gone, keeps anybody waiting."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter

import pytest

from paracaption.flows import artifacts
from paracaption.flows.artifacts import BuildBoard, Publisher, card_page, publish_table, stage_rows
from paracaption.pipeline.corpus.utilization import StageUtilization
from paracaption.pipeline.executor.progress import Progress, StageProgress


@pytest.fixture
def publisher(monkeypatch):
    """A publisher of this test alone, and what Prefect was asked through it."""
    fresh = Publisher()
    monkeypatch.setattr(artifacts, "PUBLISHER", fresh)
    return fresh


@pytest.fixture
def prefect_calls(monkeypatch):
    """Stands in for Prefect's functions; `calls` is what they were given, `raises` what they raise."""
    import prefect.artifacts

    class Stand:
        calls: list = []
        raises: Exception | None = None

    def of(name):
        def call(*given, **named):
            if Stand.raises:
                raise Stand.raises
            Stand.calls.append((name, given, named))
            return "an-id"

        return call

    for name in ("create_progress_artifact", "update_progress_artifact", "create_table_artifact"):
        monkeypatch.setattr(prefect.artifacts, name, of(name))
    return Stand


def progress(done: int = 1, pending: int = 4) -> Progress:
    stages = {"source": StageProgress(units=1), "caption": StageProgress(units=1, asked=3)}
    utilization = {
        "caption": StageUtilization(actors=2, asked=3, busy_s=1.5, alive_s=3.0, report={"hits": 0.5})
    }
    found = Progress("coconut", pending=pending, done=done, stages=stages, utilization=utilization)
    found.dropped = Counter({"caption/not_words": 2})
    return found


def test_a_call_that_hangs_keeps_nobody_waiting_and_the_end_waits_only_so_long(publisher):
    release = threading.Event()
    started = time.monotonic()
    for _ in range(500):
        publisher.put(release.wait, timeout=60)
    assert not publisher.wait(timeout_s=0.2)
    assert time.monotonic() - started < 5
    release.set()


def test_a_server_that_is_gone_is_one_warning_and_one_that_is_back_is_used_again(publisher, caplog):
    made = []

    def call(fails: bool):
        if fails:
            raise ConnectionError("refused")
        made.append(1)

    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            publisher.put(call, fails=True)
        assert not publisher.wait()
        assert [record.message for record in caplog.records] == [
            "Prefect's server does not accept artifacts (refused); the run continues without them"
        ]
        publisher.put(call, fails=False)
        assert publisher.wait() and made == [1]


@pytest.mark.soak
def test_calls_are_made_in_their_order_in_the_context_of_who_put_them(publisher):
    from contextvars import ContextVar

    place: ContextVar[int] = ContextVar("place", default=-1)
    seen = []
    for number in range(20):
        place.set(number)
        publisher.put(lambda: seen.append(place.get()))
    assert publisher.wait()
    assert seen == list(range(20))


def test_a_bar_goes_on_where_the_server_was_away_and_is_made_again_where_it_has_forgotten(
    publisher, prefect_calls, monkeypatch
):
    import prefect.artifacts
    from prefect.exceptions import ObjectNotFound

    monkeypatch.setattr(artifacts, "UPDATE_EVERY_S", -1.0)
    board = BuildBoard()
    prefect_calls.raises = ConnectionError("away")
    board.show(progress(1))
    publisher.wait()
    prefect_calls.raises = None
    board.show(progress(2))
    assert publisher.wait()
    board.show(progress(3))
    assert publisher.wait()
    assert [(name, named["progress"]) for name, _, named in prefect_calls.calls] == [
        ("create_progress_artifact", 50.0),
        ("update_progress_artifact", 75.0),
    ]

    def forgotten(*_, **__):
        raise ObjectNotFound(Exception("404"))

    monkeypatch.setattr(prefect.artifacts, "update_progress_artifact", forgotten)
    board.finish()
    assert publisher.wait()
    assert [name for name, _, _ in prefect_calls.calls[2:]] == [
        "create_progress_artifact",
        "create_table_artifact",
    ]


def test_every_row_of_a_table_has_every_column(publisher, prefect_calls):
    """Prefect's page takes the columns from the first row, and `source` has no model."""
    publish_table("coconut-stages", stage_rows(progress()))
    assert publisher.wait()
    [(_, _, named)] = prefect_calls.calls
    columns = ["stage", "units", "regions", "asked", "seconds", "dropped"]
    columns += ["actors", "start-up s", "regions/s each", "busy", "GPU in calls", "hits"]
    assert [list(row) for row in named["table"]] == [columns, columns]
    source, caption = named["table"]
    assert source["actors"] is None and source["dropped"] == 0
    assert (caption["actors"], caption["regions/s each"], caption["busy"], caption["hits"]) == (
        2,
        2.0,
        0.5,
        0.5,
    )
    assert caption["dropped"] == 2


def test_the_card_begins_with_its_title_and_has_its_plots_in_it(tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "funnel.png").write_bytes(b"a picture")
    card = (
        "---\npretty_name: Region captions\nlicense: other\n---\n\n# Region captions\n\ntext\n\n---\n\n"
        "![funnel](plots/funnel.png)\n![gone](plots/gone.png)\n![mask](plots/../../secret.png)\n"
    )
    page = card_page(card, tmp_path)
    assert page.startswith("# Region captions\n\ntext\n\n---\n")
    assert "![funnel](data:image/png;base64,YSBwaWN0dXJl)" in page
    assert "![gone](plots/gone.png)" in page and "secret.png" in page
    assert card_page("# No front matter\n", tmp_path) == "# No front matter\n"
