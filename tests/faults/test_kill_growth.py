"""A corpus that grows, dies at every record of its log, and resumes: equal to one that nobody killed.

Every step of a corpus's life after its first build is killed in a process of its own, with SIGKILL, around
each record that it writes: before the record stands, after it, and while its files are moved. `make test` has
one of the three, in turn, for each record that plans or commits units; `make soak` has all of them.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from paracaption.pipeline.corpus import log, plots, removal, verify
from paracaption.pipeline.corpus.owner import Owner
from paracaption.pipeline.corpus.records import Commit, Planned
from paracaption.pipeline.executor import committer, driver
from paracaption.pipeline.executor.changed_files import note_changed_files
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.schemas.config import BuildConfig
from tests.building import calls, committed, config_of
from tests.pipeline.corpus.test_growth import SIZE, records, samples
from tests.synthetic import jpeg, write_coconut, write_sa1b

pytestmark = [pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(1800)]

WHENS = ("before", "after", "moving")
REMOVED = ["coconut/000000000001", "sa1b/sa_0"]
CHANGED = "000000000002"

_IMPORTED = ["pandas", "pyarrow.dataset", "pyarrow.parquet", "tests.backends", "tests.building"]
"""What a build imports on its way, which takes most of the time of a small one."""


class Step(NamedTuple):
    """One step of a corpus's life.

    Attributes:
        does: "build", "check files" (and build), or "remove".
        config: of the corpus from this step on.
    """

    does: str
    config: BuildConfig


class Life:
    """The sources of a corpus and its steps; the sources change with them."""

    def __init__(self, root: Path):
        self.out = root / "out"
        self._root = root
        self._coconut = [{"source": "coconut", **write_coconut(root / "a", 5, 2, SIZE)}]
        self._subsets: dict[str, Any] = {"coconut": {"sources": self._coconut}}

    def begin(self) -> Step:
        return self._step()

    def new_images(self) -> Step:
        write_coconut(self._root / "a", 7, 2, SIZE)
        return self._step()

    def second_source(self) -> Step:
        self._coconut.append({"source": "coconut", **write_coconut(self._root / "b", 3, 2, SIZE, first=7)})
        return self._step()

    def another_subset(self) -> Step:
        tars = write_sa1b(self._root / "tars", 3, 2, SIZE)
        self._subsets["sa1b"] = {"sources": [{"source": "sa1b", **tars}]}
        return self._step()

    def changed_file(self) -> Step:
        photo = np.full((*SIZE, 3), 77, np.uint8)
        (self._root / "a/photos" / f"{CHANGED}.jpg").write_bytes(jpeg(photo))
        return self._step("check files")

    def removal(self) -> Step:
        return self._step("remove")

    def config(self, out: Path) -> BuildConfig:
        return config_of(out, subsets=self._subsets)

    def _step(self, does: str = "build") -> Step:
        return Step(does, self.config(self.out))


GROWTH = ("new_images", "second_source", "another_subset")
STEPS = (*GROWTH, "changed_file", "removal")


def take(does: str, config: BuildConfig) -> None:
    """Do a step, as the command of its name does it; each unit is committed by a record of its own."""
    committer.COMMIT_EVERY_S = 0.0
    plots.draw_plots = lambda _: dict.fromkeys(plots.NAMES, b"plot")  # most of the time, and always the same
    if does == "remove":
        removal.remove(config.out, REMOVED)
        return
    if does == "check files":
        note_changed_files(config)
    driver.build(config, LocalEngine())


def take_and_die(does: str, text: str, number: int, when: str) -> None:
    """The same in a process that is killed around the record of a number."""
    write, move = Owner._append, Owner.move

    def append(self: Owner, record: Any, is_claim: bool = False) -> bool:
        is_it = self.state.number + 1 == number
        if is_it and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        written = write(self, record, is_claim)
        if is_it and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    def move_one(self: Owner) -> None:
        if self.state.number == number and when == "moving":
            store = self._store

            class MovingOnce:
                def __getattr__(self, name: str) -> Any:
                    return getattr(store, name)

                def move(self, *arguments: Any) -> None:
                    store.move(*arguments)
                    os.kill(os.getpid(), signal.SIGKILL)

            self._store = MovingOnce()  # type: ignore[assignment]
        move(self)

    Owner._append, Owner.move = append, move_one  # type: ignore[method-assign]
    take(does, BuildConfig.model_validate_json(text))


class Killing:
    """Kills a step at its records.

    Args:
        out: the corpus, as it is before the step.
    """

    def __init__(self, out: Path):
        self._out, self._before = out, out.with_name("before")
        shutil.rmtree(self._before, ignore_errors=True)
        shutil.copytree(out, self._before)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*_IMPORTED, __name__])

    def put_back(self) -> None:
        shutil.rmtree(self._out)
        shutil.copytree(self._before, self._out)

    def kill(self, step: Step, number: int, when: str) -> bool:
        """Whether it died there: a record without files has no moves to die at."""
        self.put_back()
        arguments = (step.does, step.config.model_dump_json(), number, when)
        process = self._context.Process(target=take_and_die, args=arguments)
        process.start()
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL), f"{step.does}: {when} record {number}"
        return process.exitcode != 0


@pytest.fixture
def quick(monkeypatch):
    """What `take` sets is set back."""
    monkeypatch.setattr(committer, "COMMIT_EVERY_S", 0.0)
    monkeypatch.setattr(plots, "draw_plots", plots.draw_plots)


def _check(life: Life, expected: dict[str, str], what: str) -> None:
    """It is the corpus that nobody killed, whole, and nothing is left over."""
    assert committed(life.out) == expected, what
    found = verify.verify(life.out)
    assert found.ok, f"{what}: {found.text()}"
    assert driver.is_finished(driver.complete(life.config(life.out))), what


def _kill_everywhere(life: Life, name: str, whole: bool) -> int:
    """Take a step, dying at each of its records (unless `whole`: of those that plan or commit units)."""
    killing = Killing(life.out)
    first = log.last_number(str(life.out)) + 1
    step = getattr(life, name)()
    take(*step)
    written = [each for each in log.read_records(str(life.out)) if each.number >= first]
    expected, paid = committed(life.out), len(set(_paid(life)))
    _check(life, expected, f"{name}, undisturbed")
    chosen = [each.number for each in written if whole or isinstance(each, Planned | Commit)]
    deaths = 0
    for turn, number in enumerate(chosen):
        for when in WHENS if whole else (WHENS[turn % len(WHENS)],):
            deaths += killing.kill(step, number, when)
            what = f"{name}: {when} record {number}, a {type(written[number - first]).__name__}"
            take(*step)
            _check(life, expected, what)
            assert len(set(_paid(life))) == paid, what
    return deaths


def _paid(life: Life) -> list[str]:
    return calls(life.out.with_name("captioner.log"))


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_every_step_that_dies_at_any_record_and_is_taken_again_is_as_if_it_had_not(tmp_path, quick, whole):
    life = Life(tmp_path)
    take(*life.begin())
    for name in STEPS:
        assert _kill_everywhere(life, name, whole) >= (15 if whole else 2), name
        if name == GROWTH[-1] or name == "changed_file":
            at_once = life.config(tmp_path / f"at once {name}")
            take("build", at_once)
            assert records(life.out) == records(at_once.out), name
            assert samples(life.out) == samples(at_once.out), name
