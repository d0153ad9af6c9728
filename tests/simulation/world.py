"""Builds of a few units in memory with faults at any call, and what has to hold whatever happens.

A run is a list of builds of one corpus. Each but the last may meet one fault: an error or a short read of a
source or of the output, a full disk, a model that fails, a clock that jumps, a call after which nothing of
the process reaches the disk. The last build is undisturbed. A run is decided by its seed, or by the number of
the call and the kind of fault.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from unittest import mock

import httpx
import msgspec

from paracaption.pipeline.corpus import log as commit_log
from paracaption.pipeline.corpus import owner as owning
from paracaption.pipeline.corpus import plots, processes, removal
from paracaption.pipeline.executor import committer, driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.io import failures, files, store
from paracaption.pipeline.models import registry
from paracaption.pipeline.stages.base import ModelStage
from paracaption.pipeline.stages.evidence import EvidenceStore
from paracaption.pipeline.stages.recipes import recipe_of
from paracaption.schemas.config import BuildConfig, dump_config
from paracaption.schemas.errors import ParaCaptionError
from tests.backends import InstantCaptioner, InstantJudge, InstantSegmenter
from tests.building import config_of
from tests.simulation.disk import Disk, DiskFiles, Inode, Killed, SystemCalls
from tests.synthetic import write_coconut, write_sa1b

IMAGES = {"coconut": 4, "sa1b": 2}
MASKS = 3
REMOVED = "000000000001"
SIZE = (24, 32)

_DIFFERS = re.compile(r"^/(log|beat|\.replaced|events)/|/journal/|/plan\.json$")
"""Files that may differ between two builds of equal corpora; the last has an estimate of the photos' size."""

KINDS = ("kill", "EIO", "ENOSPC", "EACCES", "ENOENT", "ESTALE", "503", "short", "away", "clock", "odd")
"""What may happen at a call. "away": from here to the end of this build the sources cannot be read. "odd": a
model answers another number of questions than it was asked."""

_SOURCES = {"EIO", "EACCES", "ENOENT", "ESTALE", "503", "short", "away", "clock", "kill"}
_OUTPUT = {"EIO", "ENOSPC", "EACCES", "ESTALE", "clock", "kill"}
_MODEL = {"EIO", "kill", "clock", "odd"}
_REQUEST = {"kill", "kill_done", "503", "down", "refused", "clock"}
_WRITE = {*_REQUEST, "kill_stuck", "stuck", "lost_answer", "repeated", "repeated_late"}
_FITTING = {"source": _SOURCES, "output": _OUTPUT, "model": _MODEL, "request": _REQUEST, "write": _WRITE}


class Fault(NamedTuple):
    """One fault: at which call of a build, and what."""

    at: int
    kind: str

    def fits(self, where: str) -> bool:
        """Whether this can happen to a call of a source, of the output or of a model, or to a request."""
        return self.kind in _FITTING[where]


class World:
    """A source, a corpus and models in memory.

    Args:
        root: a real, empty folder; what no corpus promises (events, notes) is written there.
        out: the corpus; "" is a folder.

    Attributes:
        kinds: of faults that may happen here.
        retries_s: for how long what fails for a while is tried again.
    """

    kinds: tuple[str, ...] = KINDS
    retries_s = 0.0

    def __init__(self, root: Path, out: str = ""):
        self.root = root
        self.out = out or str(root / "out")
        self.sources = {
            "coconut": _write_parts(root / "source" / "coconut", IMAGES["coconut"] // 2),
            "sa1b": write_sa1b(root / "source" / "sa1b", IMAGES["sa1b"], MASKS, SIZE),
        }
        part = {**self.sources["coconut"], "annotations": self.sources["coconut"]["annotations"][:1]}
        self.disk = Disk([str(root / "source"), self.out], self._on_call)
        self.disk.load(str(root / "source"))
        (root / "out").mkdir()
        self.loose = self.config()
        self.strict = self.config(text={"min_words": 11})
        self.small = self.config(coconut=part, sa1b=None)
        self.fault: Fault | None = None
        self.calls = 0
        self.where: list[str] = []
        self.dead = False
        self.is_away = False
        self.jump_s = 0.0
        self.happened = ""
        self.asked: Counter[tuple[str, str, int]] = Counter()

    def config(self, **changes: Any) -> BuildConfig:
        """The configuration of this world's corpus."""
        return config_of(
            self.out,
            beside=self.root,
            images_per_shard=2,
            captioner={"batch_images": 1},
            failures={
                "min_free_gb": 0,
                "stop_after_units": 2,
                "unit_retries": 0,
                "save_every_s": 0,
                "read_retry_s": self.retries_s,
            },
            **{**self.sources, **changes},
        )

    # Faults.

    def _on_call(self, what: str, path: str) -> int | None:
        if self.dead:
            raise Killed
        above = what == "flush"  # the folder that `out` lies in is flushed, too
        where = "output" if above or path.startswith(self.out) else "source"
        if self.is_away and where == "source":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        self.calls += 1
        self.where.append(where)
        if self.fault is None or self.calls - 1 != self.fault.at or not self.fault.fits(where):
            return None
        return self._happen(self.fault.kind, f"{what} {path}", path)

    def _happen(self, kind: str, call: str, path: str) -> int | None:
        self.happened = f"{kind} at {call}"
        if kind == "kill":
            self.dead = True
            raise Killed
        if kind in ("short", "odd"):
            return 7
        if kind == "clock":
            self.jump_s += 20 * 86_400
            return None
        if kind == "away":
            self.is_away = True
            kind = "EIO"
        if kind == "503":
            request = httpx.Request("GET", "http://source")
            raise httpx.HTTPStatusError("503", request=request, response=httpx.Response(503, request=request))
        number = getattr(errno, kind)
        raise OSError(number, os.strerror(number), path)

    def on_ask(self, stage: str, keys: list[tuple[str, int]]) -> bool:
        """A model is asked about regions; whether its answers are to be odd."""
        if self.dead:
            raise Killed
        self.calls += 1
        self.where.append("model")
        if self.fault is not None and self.calls - 1 == self.fault.at and self.fault.fits("model"):
            if self._happen(self.fault.kind, f"ask {stage}", stage) is not None:
                return True
        self.asked.update((stage, *key) for key in keys)
        return False

    # Builds.

    def build(
        self,
        config: BuildConfig,
        fault: Fault | None = None,
        remove: bool = False,
        random: Random | None = None,
        **asked: Any,
    ) -> str:
        """One build by a process of its own; what it ended with: "" if with success.

        Args:
            config: what is built.
            fault: what happens, and when.
            remove: take an image out of the corpus instead.
            random: what else chance decides.
            asked: of `driver.build`.

        Raises:
            AssertionError: something does not hold.
        """
        self.fault, self.calls, self.dead, self.is_away, self.happened = fault, 0, False, False, ""
        self.where.clear()
        known = self.evidence(config)
        self.asked.clear()
        ended = ""
        self._begin(random or Random(0))
        with ExitStack() as stack:
            for each in self._patches():
                stack.enter_context(each)
            try:
                if remove:
                    removal.remove(self.out, [REMOVED], delete_replaced=True)
                else:
                    driver.build(config, LocalEngine(), **asked)
            except Killed:
                ended = "killed"
            except ParaCaptionError as error:
                ended = f"{type(error).__name__}: {error}"
        again = self.asked.keys() & known
        assert not again, f"asked again after its answer was saved: {sorted(again)[:3]}; {self.happened}"
        return ended

    def _begin(self, random: Random) -> None:
        """A process begins."""

    def _patches(self) -> list[Any]:
        disk, calls = self.disk, SystemCalls(self.disk)

        def new_file(path: str, mode: str) -> Any:
            from tests.simulation.disk import _File

            return _File(disk, path, mode)

        def load(protocol: str, *_: Any) -> Any:
            return {"captioner": Captioner, "judge": Judge, "segmenter": Segmenter}[protocol](self)

        return [
            mock.patch.dict(files._BACKENDS, {"file": DiskFiles(disk)}),
            mock.patch.dict(files._LISTED, clear=True),
            mock.patch.object(store, "os", calls),
            mock.patch.object(store, "_Durable", new_file),
            mock.patch.object(store.FolderStore, "read", lambda _, path: DiskFiles(disk).read(path)),
            mock.patch.object(store.FolderStore, "delete_folder", lambda _, path: self._delete_folder(path)),
            mock.patch.object(processes, "is_dead", lambda _: True),
            mock.patch.object(owning, "BEATS_PER_LEASE", 1e-4),
            mock.patch.object(owning.time, "time", self._time),
            mock.patch.object(registry, "load_backend", load),
            mock.patch.object(plots, "draw_plots", lambda _: {name: b"plot" for name in plots.NAMES}),
            mock.patch.object(failures.RETRYING, "_sleep", lambda _: None),
            mock.patch.object(committer, "COMMIT_EVERY_S", 0.0),
            mock.patch.object(committer, "dump_config", _dumped_once),  # a fifth of the time, always the same
            mock.patch.object(driver, "dump_config", _dumped_once),
        ]

    def _time(self) -> float:
        return 1_800_000_000.0 + self.jump_s

    def _delete_folder(self, path: str) -> None:
        for name in [each for each in self.disk.names if each.startswith(f"{path}/")]:
            self.disk.on_call("delete", name)
            self.disk.change(name, None)

    def crash(self, random: Random) -> None:
        """What a power cut leaves."""
        self.disk.crash(random)

    # What is there.

    def only_sources(self) -> Any:
        """What `restore` takes: only the sources."""
        return {path: each for path, each in self.disk.names.items() if not path.startswith(f"{self.out}/")}

    def saved(self) -> Any:
        """What `restore` takes: what is there now."""
        return {path: _copied(inode) for path, inode in self.disk.names.items()}

    def restore(self, saved: Any) -> None:
        """A new disk with copies of these files."""
        disk = self.disk
        disk.names = {path: _copied(inode) for path, inode in saved.items()}
        disk.durable, disk.pending = dict(disk.names), []
        disk.folders = set()
        for path in saved:
            disk.make_folders(os.path.dirname(path))
        self.jump_s = 0.0

    def snapshot(self) -> dict[str, bytes]:
        """The files of the corpus."""
        return self.disk.snapshot(self.out)

    def content(self, place: str) -> bytes | None:
        """A file, by its path below the corpus; None if it is not there."""
        inode = self.disk.names.get(f"{self.out}/{place}")
        return inode and bytes(inode.data)

    def left_over(self) -> list[str]:
        """Files that should not be there in the end, besides those that `finished` has."""
        return []

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Nothing fails."""
        with mock.patch.dict(files._BACKENDS, {"file": DiskFiles(self._quiet())}):
            yield

    # What holds.

    def evidence(self, config: BuildConfig) -> set[tuple[str, str, int]]:
        """(stage, key, region) of every answer that is saved."""
        found: set[tuple[str, str, int]] = set()
        with self.reading():
            for subset in config.subsets:
                for stage in recipe_of(config, subset):
                    if isinstance(stage, ModelStage):
                        folder = f"{self.out}/{subset}/evidence/{stage.name}-{stage.evidence_digest}"
                        for path in self.disk.snapshot(folder):
                            name = path.rpartition("/")[2]
                            if not name.startswith("."):
                                rows = EvidenceStore(Path(folder), stage.evidence).load(
                                    name.removesuffix(".parquet")
                                )
                                found |= {(f"{subset}/{stage.name}", *place) for place in rows}
        return found

    def _quiet(self) -> Disk:
        quiet = Disk(self.disk.roots)
        quiet.names, quiet.folders = self.disk.names, self.disk.folders
        return quiet

    def committed(self) -> dict[str, str]:
        """SHA-256 of every file of the committed units, by its path below the corpus.

        Raises:
            AssertionError: a committed file is missing, or is not what was committed.
        """
        found = {}
        with self.reading():
            if not commit_log.exists(self.out):
                return {}
            state = commit_log.read_state(self.out)
        for name, each in state.units.items():
            for file in each.unit.files():
                places = [self.content(place) for place in (file.temporary, file.place) if place]
                data = next((data for data in places if data is not None), None)
                assert data is not None, f"{name}: {file.path} is committed and not there; {self.happened}"
                found[file.path] = hashlib.sha256(data).hexdigest()
                assert found[file.path] == file.sha256, (
                    f"{name}: {file.path} is another file; {self.happened}"
                )
        return found

    def finished(self) -> dict[str, str]:
        """SHA-256 of every file of the corpus that has to be the same in the end."""
        kept = {
            path[len(self.out) + 1 :]: hashlib.sha256(data).hexdigest()
            for path, data in self.disk.snapshot(self.out).items()
        }
        return {path: digest for path, digest in kept.items() if not _DIFFERS.search(f"/{path}")}

    def photo(self, key: str) -> bytes:
        """The bytes of a photo of the source."""
        found = (inode.data for path, inode in self.disk.names.items() if path.endswith(f"/photos/{key}.jpg"))
        return bytes(next(found))

    def regions(self) -> tuple[int, int]:
        """Regions declared and regions kept plus dropped, as the committed manifests count them."""
        with self.reading():
            units = commit_log.read_state(self.out).units.values()
        manifests = [msgspec.json.decode(self.content(each.unit.manifest.place) or b"") for each in units]
        return sum(each["regions_in"] for each in manifests), sum(
            each["kept"] + sum(each["dropped"].values()) for each in manifests
        )


def _write_parts(root: Path, number: int) -> dict[str, Any]:
    """A release whose images are in two lists, of which the second one may come later."""
    found: dict[str, Any] = {}
    lists = []
    for name, first in (("first.json", 0), ("second.json", number)):
        found = write_coconut(root, number, MASKS, SIZE, first)
        lists.append(Path(found["annotations"][0]).rename(root / name))
    return found | {"annotations": list(map(str, lists))}


class _Model:
    def __init__(self, world: World):
        self.world = world


class Captioner(_Model):
    def caption(self, images: list[Any]) -> list[list[str | None]]:
        keys = [(image.key, region.id) for image in images for region in image.live()]
        if self.world.on_ask(f"{images[0].subset}/caption", keys):
            return []
        return [[InstantCaptioner._words(image, region) for region in image.live()] for image in images]


class Judge(_Model):
    def ask(self, questions: list[Any]) -> list[Any]:
        return InstantJudge().ask(questions[1:] if self.world.on_ask("judge", []) else questions)


class Segmenter(_Model):
    def segment(self, photo: Any, phrases: list[str], boxes: Any) -> list[list[Any]]:
        found = InstantSegmenter().segment(photo, phrases, boxes)
        return found[1:] if self.world.on_ask("segmenter", []) else found


def _dumped_once(config: BuildConfig) -> str:
    key = config.model_dump_json()
    if key not in _DUMPED:
        _DUMPED[key] = dump_config(config)
    return _DUMPED[key]


_DUMPED: dict[str, str] = {}


class Expected(NamedTuple):
    """What an undisturbed build gives: the finished corpus, its units' files, and the calls it takes."""

    finished: dict[str, str]
    committed: dict[str, str]
    where: list[str]


class Simulation:
    """Runs in one world; the disk is new for each.

    Args:
        root: a real, empty folder.
    """

    def __init__(self, root: Path, kind: type[World] = World):
        self.world = kind(root)
        self._sources = self.world.only_sources()
        self._undisturbed(self.world.loose)  # the first build of a process makes some calls of its own
        self.loose = self._undisturbed(self.world.loose)
        self._built = self.world.saved()
        self.strict = self._undisturbed(self.world.strict)
        self.small = self._undisturbed(self.world.small)
        self._small = self.world.saved()
        self._where = {"fresh": self.loose.where}
        for name, start, config, remove in (
            ("rebuild", self._built, self.world.strict, False),
            ("grow", self._small, self.world.loose, False),
            ("remove", self._built, self.world.loose, True),
        ):
            self.world.restore(start)
            assert self.world.build(config, remove=remove) == ""
            self._where[name] = list(self.world.where)
            if name == "grow":
                self.grown = Expected(self.world.finished(), self.world.committed(), [])
        self.removed = Expected(self.world.finished(), self.world.committed(), [])
        self.story: list[str] = []
        self.declared = MASKS * sum(IMAGES.values())
        assert self.loose.committed != self.strict.committed, "the thresholds make no difference"
        for path, digest in self.loose.committed.items():  # only its manifests name the step of the work list
            assert "/manifests/" in path or self.grown.committed[path] == digest, path

    def _undisturbed(self, config: BuildConfig) -> Expected:
        """A fresh build; the disk is left as it is then."""
        world = self.world
        self.world.restore(self._sources)
        ended = world.build(config)
        assert ended == "", ended
        return Expected(world.finished(), world.committed(), list(world.where))

    def fresh(self, *faults: Fault, random: Random | None = None) -> None:
        """Build from nothing with these faults, one in each build, and once more without.

        Raises:
            AssertionError: something does not hold.
        """
        self.world.restore(self._sources)
        self._run(self.world.loose, faults, [{}, self.loose.committed], self.loose, random or Random(0))

    def rebuild(self, *faults: Fault, random: Random | None = None) -> None:
        """The same for a corpus that is built already, with another threshold."""
        self.world.restore(self._built)
        allowed = [self.loose.committed, self.strict.committed]
        self._run(self.world.strict, faults, allowed, self.strict, random or Random(0))

    def grow(self, *faults: Fault, random: Random | None = None) -> None:
        """The same for a corpus to which images and a subset are added."""
        self.world.restore(self._small)
        allowed = [self.small.committed, self.grown.committed]
        self._run(self.world.loose, faults, allowed, self.grown, random or Random(0))

    def remove(self, *faults: Fault, random: Random | None = None) -> None:
        """The same for a corpus from which an image is removed. In the end nothing has its photo."""
        self.world.restore(self._built)
        photo = self.world.photo(REMOVED)
        allowed = [self.loose.committed, self.removed.committed]
        self._run(self.world.loose, faults, allowed, self.removed, random or Random(0), remove=True)
        having = [path for path, data in self.world.snapshot().items() if photo in data]
        assert not having, f"the photo of a removed image is in {having}"
        assert all(key != REMOVED for _, key, _ in self.world.evidence(self.world.loose))

    def seeded(self, seed: int) -> None:
        """A run that this number decides."""
        random = Random(seed)
        name = random.choices(("fresh", "rebuild", "grow", "remove"), (4, 3, 2, 1))[0]
        calls, faults = self._where[name], []
        for _ in range(random.randint(1, 3)):
            at = int(len(calls) * random.random() ** 1.5)  # the later builds have less to do
            faults.append(
                Fault(
                    at, random.choice([each for each in self.world.kinds if Fault(at, each).fits(calls[at])])
                )
            )
        getattr(self, name)(*faults, random=random)

    def faults(self) -> list[tuple[str, Fault]]:
        """A fault of every kind at each call of a fresh build, of a rebuild, of a growth and of a removal.

        Errors that are the same kind to whoever meets them take turns.
        """
        return [
            (where, Fault(at, kind))
            for where, calls in self._where.items()
            for at, call in enumerate(calls)
            for kind in _kinds(call, at)
        ]

    def problem_of(self, where: str, *faults: Fault) -> str:
        """What does not hold in a build of this kind with these faults; "" if everything holds."""
        return self._problem(lambda: getattr(self, where)(*faults))

    def problem_of_seed(self, seed: int) -> str:
        """The same for a seeded run."""
        found = self._problem(lambda: self.seeded(seed))
        return f"seed {seed}: {found}" if found else ""

    def _problem(self, run: Callable[[], None]) -> str:
        try:
            run()
        except Exception as error:  # noqa: BLE001 - also what should never have come through
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            return f"{kind}{error}\nafter {'; '.join([*self.story, self.world.happened])}"
        return ""

    def _run(
        self,
        config: BuildConfig,
        faults: Sequence[Fault],
        allowed: list[dict[str, str]],
        expected: Expected,
        random: Random,
        remove: bool = False,
    ) -> None:
        world = self.world
        self.story = []
        for fault in faults:
            ended = world.build(config, fault, remove, random)
            self.story.append(f"{world.happened or 'nothing'}: {ended or 'built'}")
            if ended == "killed":
                world.crash(random)
            self._check_units(world.committed(), allowed)
        if remove:
            ended = world.build(config, remove=True, random=random)
            assert ended == "", ended
        ended = world.build(config, retry_failed=True, random=random)
        assert ended == "", ended
        assert world.committed() == expected.committed, "the units are not those of an undisturbed build"
        found, wanted = world.finished(), expected.finished
        other = sorted(path for path in found.keys() | wanted if found.get(path) != wanted.get(path))
        assert not other, f"not as after an undisturbed build: {', '.join(other)}"
        declared = self.declared - MASKS * remove
        assert world.regions() == (declared, declared)
        assert not (left := world.left_over()), f"left after the sweep: {left}"

    def _check_units(self, found: dict[str, str], allowed: list[dict[str, str]]) -> None:
        """No committed unit is worse than it was."""
        for path in allowed[0]:
            assert path in found or "/shards/" in path, f"{path}: is committed no more"
            known = {each.get(path) for each in allowed}
            assert found.get(path) in known, f"{path}: is neither what it was nor what it is to be"


def _kinds(call: str, at: int) -> tuple[str, ...]:
    """The kinds of fault at a call of a source, of the output or of a model."""
    if call in ("request", "write"):
        return tuple(sorted(_FITTING[call]))
    if call == "output":
        return "kill", ("EIO", "ENOSPC", "EACCES", "ESTALE", "clock")[at % 5]
    if call == "source":
        return "kill", ("EIO", "ESTALE", "503")[at % 3], "EACCES", "ENOENT", "short", "away"
    return "kill", "EIO", "odd"


def _copied(inode: Inode) -> Inode:
    made = Inode()
    made.data[:] = made.flushed = bytes(inode.data)
    return made
