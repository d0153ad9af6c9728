"""Looking back in the commit log: what was committed, what changed since, and taking a rebuild back."""

import hashlib
import shutil
from pathlib import Path

import msgspec
import pytest

from paracaption.pipeline.corpus import history, log, merge, reader, status, undo, versions
from paracaption.pipeline.corpus.owner import Owner, own
from paracaption.pipeline.corpus.records import Claim, Commit, Config, Merged, Sweep
from paracaption.pipeline.corpus.verify import verify
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.io.store import FolderStore
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError, IntegrityError
from tests.building import config_of
from tests.synthetic import write_coconut

STRICT = {"masks": {"min_area_px": 1000}, "text": {"min_chars": 54}}
NOTHING = {"masks": {"min_area_px": 10_000_000}}
_NOT_COMPARED = {log.LOG, log.BEAT, log.REPLACED, "events"}


class Corpora:
    """Builds the same corpus with other thresholds, in `root`/out."""

    def __init__(self, root: Path):
        self.root, self.out = root, str(root / "out")
        self.source = write_coconut(root / "source", 9) | {"license": "synthetic"}

    def config(self, **changes) -> BuildConfig:
        return config_of(self.root / "out", coconut=self.source, **changes)

    def build(self, retry_failed: bool = False, **changes) -> int:
        """Build; returns the number of the log's newest record."""
        driver.build(self.config(**changes), LocalEngine(), retry_failed=retry_failed)
        return log.read_state(self.out).number


def files_of(out: str) -> dict[str, str]:
    """SHA-256 of every file that is committed, merged or configured."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(out).rglob("*"))
        if path.is_file() and path.relative_to(out).parts[0] not in _NOT_COMPARED
    }


@pytest.fixture(scope="module", autouse=True)
def _plots_in_no_time():
    """Plots that say the same as the drawn ones: they change when the statistics do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            merge.plots,
            "draw_plots",
            lambda summary: dict.fromkeys(merge.plots.NAMES, msgspec.json.encode(summary)),
        )
        yield


@pytest.fixture(scope="module")
def _rebuilt(tmp_path_factory):
    root = tmp_path_factory.mktemp("rebuilt")
    corpora = Corpora(root)
    first = corpora.build()
    before = files_of(corpora.out)
    second = corpora.build(**STRICT)
    return root, first, second, before


@pytest.fixture
def rebuilt(_rebuilt, tmp_path):
    """A corpus that was built, and built again with other thresholds.

    Returns:
        Its folder, the newest record of each build, and its files after the first one.
    """
    root, first, second, before = _rebuilt
    shutil.copytree(root / "out", tmp_path / "out")
    return str(tmp_path / "out"), first, second, before


def take_back(out: str) -> None:
    undo.undo(out, undo.find_rebuild(out))


# What was committed.


@pytest.mark.soak
def test_the_state_after_a_record_has_the_units_of_then(rebuilt):
    out, first, second, _ = rebuilt
    then, now = history.state_at(out, first), history.state_at(out, second)
    assert then.units.keys() == now.units.keys() and then.number == first
    assert all(then.units[name].since < first < now.units[name].since for name in now.units)
    assert history.state_at(out, second) == log.read_state(out)
    assert history.state_at(out, 0).units == {}


def test_a_record_that_does_not_exist_is_one_line(rebuilt, tmp_path):
    out, _, second, _ = rebuilt
    with pytest.raises(ConfigError, match=rf"no record {second + 1} .*records are 1 to {second};"):
        history.state_at(out, second + 1)
    with pytest.raises(ConfigError, match="no such folder"):
        history.state_at(str(tmp_path / "empty"), 1)


def assert_files_are_found(out: str, number: int) -> None:
    """Every file of a version has a place, with the content that the log says."""
    for name, unit, places in history.unit_files_at(out, number):
        for file, place in zip(unit.files(), places, strict=True):
            assert place is not None, (name, file.path)
            assert hashlib.sha256((Path(out) / place).read_bytes()).hexdigest() == file.sha256


def test_the_files_of_a_former_version_are_found_where_they_are_kept(rebuilt):
    out, first, second, before = rebuilt
    assert_files_are_found(out, first)
    assert_files_are_found(out, second)
    for _, unit, _ in history.unit_files_at(out, first):
        assert all(before[file.path] == file.sha256 for file in unit.files())


def test_the_configuration_of_each_version_is_in_the_log(rebuilt):
    out, first, second, _ = rebuilt
    texts = [history.config_at(out, number) for number in (first, second)]
    assert texts[1] == (Path(out) / "config.yaml").read_text()
    assert versions.changed_keys(*texts) == ["masks.min_area_px: 16 -> 1000", "text.min_chars: 12 -> 54"]


@pytest.mark.soak
def test_states_behind_a_checkpoint_are_those_of_all_records(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "CHECKPOINT_EVERY", 5)
    corpora = Corpora(tmp_path)
    corpora.build()
    newest = corpora.build(**STRICT)
    state = log.LogState()
    for number in range(1, newest + 1):
        state = state.after(log.read_record(corpora.out, number))
        found = history.state_at(corpora.out, number)
        assert (found.units, found.config, found.number) == (state.units, state.config, number)


# What changed.


def kept_regions(out: str, files: dict) -> set[tuple[str, int]]:
    return {
        (row["key"], row["region"])
        for path in files
        for row in reader.read_ledger(f"{out}/{path}").to_pylist()
        if row["kept"]
    }


def test_a_diff_counts_what_the_two_versions_of_each_ledger_say(rebuilt):
    out, first, second, _ = rebuilt
    then = [places[-2] for _, _, places in history.unit_files_at(out, first)]
    now = [places[-2] for _, _, places in history.unit_files_at(out, second)]
    old, new = kept_regions(out, then), kept_regions(out, now)
    found = history.diff(out, first, second, limit=1000)
    subset = found.subsets["coconut"]
    assert {(each.key, each.region) for each in found.lost} == old - new != set()
    assert (found.gained, new - old) == ([], set())
    assert subset.kept == (len(old), len(new))
    assert (subset.changed, subset.unchanged, subset.added, subset.removed, subset.gone) == (3, 0, 0, 0, 0)
    assert subset.lost == {"usable_masks/mask_too_small": 4, "clean_text/text_too_short": 8}
    assert all(each.caption and each.detail for each in found.lost)


def test_a_diff_backwards_gains_what_the_other_one_loses(rebuilt):
    out, first, second, _ = rebuilt
    there, back = history.diff(out, first, second, 5), history.diff(out, second, first, 5)
    assert there.lost == back.gained and len(there.lost) == 5
    assert there.subsets["coconut"].lost == back.subsets["coconut"].gained


def test_units_of_one_version_alone_are_counted_apart(rebuilt):
    out, first, _, _ = rebuilt
    commits = [record.number for record in log.read_records(out) if isinstance(record, Commit)]
    found = history.diff(out, commits[0], first).subsets["coconut"]
    assert (found.unchanged, found.added, found.changed) == (1, 2, 0)
    assert found.kept[1] - found.kept[0] == found.added_kept > 0 and not found.gained
    assert history.diff(out, first, commits[0]).subsets["coconut"].removed == 2


def test_a_version_whose_files_are_gone_says_so_and_what_to_do(rebuilt):
    out, first, second, _ = rebuilt
    shutil.rmtree(f"{out}/{log.REPLACED}")
    found = history.diff(out, first, second)
    assert (found.gone, found.subsets["coconut"].gone, found.lost) == ([first], 3, [])
    assert found.subsets["coconut"].kept == (36, 24)
    line = history.describe_gone(out, found)
    assert "\n" not in line and f"paracaption versions {out} --config {first}" in line


# Undo.


@pytest.mark.soak
def test_an_undo_gives_back_every_byte_and_verifies(rebuilt):
    out, _, _, before = rebuilt
    take_back(out)
    assert files_of(out) == before
    assert verify(out).ok


@pytest.mark.soak
def test_an_undo_of_an_undo_is_a_redo(rebuilt):
    out, _, _, before = rebuilt
    after = files_of(out)
    for expected in (before, after, before):
        take_back(out)
        assert files_of(out) == expected
    assert verify(out).ok


def test_a_build_after_an_undo_has_nothing_to_do(rebuilt):
    out, _, _, _ = rebuilt
    take_back(out)
    number = log.read_state(out).number
    state = log.read_state(out)
    assert state.released and isinstance(log.read_record(out, number - 1), Merged)
    assert reader.open_corpus(out).index_is_current()


@pytest.mark.soak
def test_shards_come_and_go_with_an_undo(tmp_path):
    corpora = Corpora(tmp_path)
    corpora.build()
    full = files_of(corpora.out)
    corpora.build(**NOTHING)
    empty = files_of(corpora.out)
    assert any(path.endswith(".tar") for path in full) and not any(path.endswith(".tar") for path in empty)
    for expected in (full, empty, full):
        take_back(corpora.out)
        assert files_of(corpora.out) == expected
        assert verify(corpora.out).ok


def test_a_rebuild_that_was_resumed_with_other_resources_is_taken_back_as_one(rebuilt):
    out, first, _, _ = rebuilt
    with own(out, "build", 1) as owner:  # what a resume with another `failures.stall_s` writes first
        now = owner.state.config.text.replace("stall_s: 120", "stall_s: 130")
        assert now != owner.state.config.text
        owner.append(Config(text=now, files=[owner.write("config.yaml", now.encode())]))
    found = undo.find_rebuild(out)
    assert len(found.units) == 3 and found.before.number < first + 10
    assert found.before.config.text == history.config_at(out, first)


def test_nothing_to_undo_is_one_line_and_changes_nothing(tmp_path):
    corpora = Corpora(tmp_path)
    number = corpora.build()
    with pytest.raises(ConfigError, match="nothing to undo"):
        undo.find_rebuild(corpora.out)
    with pytest.raises(ConfigError, match="no such folder"):
        undo.find_rebuild(str(tmp_path / "none"))
    assert log.read_state(corpora.out).number == number


def test_an_undo_without_the_replaced_files_changes_nothing_and_says_what_to_do(rebuilt):
    out, _, second, _ = rebuilt
    after = files_of(out)
    next(Path(out, log.REPLACED).rglob("*.tar")).unlink()
    with pytest.raises(
        ConfigError, match=r"are deleted by now .*nothing was undone.* asks no model again"
    ) as raised:
        take_back(out)
    assert "\n" not in str(raised.value)
    assert (log.read_state(out).number, files_of(out)) == (second, after)


def test_an_undo_with_a_damaged_replaced_file_changes_nothing_and_names_it(rebuilt):
    out, _, _, _ = rebuilt
    found = undo.find_rebuild(out)
    path = next(Path(out, log.REPLACED).glob("*/coconut/shards/*.tar"))
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    before = files_of(out), log.last_number(out)
    with pytest.raises(
        ConfigError, match=rf"{path.name}: this kept file is damaged.*nothing was undone.*versions"
    ) as raised:
        undo.undo(out, found)
    assert "\n" not in str(raised.value)
    assert (files_of(out), log.last_number(out)) == before


def test_an_undo_of_what_has_changed_meanwhile_is_refused(rebuilt):
    out, _, _, _ = rebuilt
    found = undo.find_rebuild(out)
    take_back(out)
    with pytest.raises(ConfigError, match=r"changed meanwhile|not kept"):
        undo.undo(out, found)


class Killed(BaseException):
    """The process ends here: nobody cleans up."""


def undo_and_be_killed(out: str, monkeypatch, moves: int) -> None:
    """Undo, and die after so many files were moved back; nothing is written after that."""
    moved: list[str] = []
    move, append = FolderStore.move, Owner.append

    def dying_move(self, path, target):
        if f"/{log.REPLACED}/" in path:
            moved.append(path)
            if len(moved) > moves:
                raise Killed
        return move(self, path, target)

    def dying_append(self, record):
        if len(moved) > moves:
            raise Killed
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "move", dying_move)
        patch.setattr(Owner, "append", dying_append)
        with pytest.raises(Killed):
            take_back(out)


@pytest.mark.parametrize("moves", [0, 1, 4, 8])
@pytest.mark.soak(keep=1)
def test_an_undo_that_died_between_its_record_and_its_moves_is_finished(rebuilt, monkeypatch, moves):
    out, first, second, before = rebuilt
    undo_and_be_killed(out, monkeypatch, moves)
    state = log.read_state(out)
    assert isinstance(state.unmoved, Commit) and state.unmoved.undoes
    for unit in reader.open_corpus(out).units("coconut"):  # readers see each unit whole, moved or not
        manifest = reader.read_manifest(unit.manifest)
        kept = reader.read_ledger(unit.ledger, ["kept"])["kept"].to_pylist()
        assert (
            sum(kept)
            == manifest.kept
            == history.state_at(out, state.number).units[f"coconut/{unit.name}"].unit.kept
        )
    assert_files_are_found(out, first)
    assert_files_are_found(out, second)
    found = undo.find_rebuild(out)
    assert found.is_begun and found.units == []
    monkeypatch.setattr("paracaption.pipeline.corpus.processes.is_dead", lambda _: True)
    take_back(out)
    assert files_of(out) == before and verify(out).ok


@pytest.mark.parametrize("kind", [Config, Merged])
@pytest.mark.soak
def test_an_undo_that_died_before_it_wrote_configuration_or_index_is_finished(rebuilt, monkeypatch, kind):
    out, _, _, before = rebuilt
    plain = Owner.append

    def append(self, record):
        if isinstance(record, kind):
            raise Killed
        plain(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Owner, "append", append)
        with pytest.raises(Killed):
            take_back(out)
    assert undo.find_rebuild(out).is_begun
    take_back(out)
    assert files_of(out) == before and verify(out).ok
    assert not undo.find_rebuild(out).is_begun


# The log in words.


def test_a_line_of_the_log_says_what_was_committed(rebuilt):
    out, _, second, _ = rebuilt
    entries = list(versions.list_versions(out))
    assert [each.kind for each in entries] == "planned config commit merged config commit merged".split()
    texts = [each.text for each in entries]
    assert texts[0] == "coconut: 9 images in 3 units"
    assert texts[2].startswith("3 units, regions kept 0 -> 36")
    assert texts[4] == "masks.min_area_px: 16 -> 1000; text.min_chars: 12 -> 54"
    assert texts[5].startswith("3 units replaced, regions kept 36 -> 24")
    every = list(versions.list_versions(out, everything=True))
    assert [each.number for each in every] == list(range(1, second + 1))
    assert not any("\n" in each.text for each in every)


def test_units_held_back_are_in_the_log_without_asking_for_everything(rebuilt):
    out, _, _, _ = rebuilt
    with own(out, "build", 1) as owner:
        owner.held_back["coconut/coconut-000001"] = "the server does not answer"
    assert list(versions.list_versions(out))[-1].text == (
        "held back: coconut/coconut-000001: the server does not answer"
    )


def test_a_damaged_log_is_one_line(rebuilt):
    out, _, _, _ = rebuilt
    path = Path(log.record_path(out, 3))
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))
    for read in (
        lambda: list(versions.list_versions(out)),
        lambda: history.state_at(out, 5),
        lambda: undo.find_rebuild(out),
        lambda: status.Watcher(out).read(),
    ):
        with pytest.raises(IntegrityError, match=r"000000000003\.json: not a record") as raised:
            read()
        assert "\n" not in str(raised.value)


def test_a_record_that_is_missing_before_a_checkpoint_is_one_line(rebuilt):
    out, _, second, _ = rebuilt
    begun = Owner(out, log.read_state(out))
    while begun.state.number <= log.CHECKPOINT_EVERY:
        begun.append(Sweep())
    Path(log.record_path(out, second)).unlink()
    assert log.read_state(out).number > log.CHECKPOINT_EVERY
    for read in (
        lambda: history.state_at(out, second),
        lambda: undo.find_rebuild(out),
        lambda: status.Watcher(out).read(),
    ):
        with pytest.raises(IntegrityError, match=rf"{second:012}\.json: missing; restore it"):
            read()


# Where a corpus stands.


def test_the_status_of_a_finished_corpus(rebuilt):
    out, _, second, _ = rebuilt
    found = status.Watcher(out).read()
    (subset,) = found.subsets
    assert (subset.units, subset.planned_units, subset.images, subset.planned_images) == (3, 3, 9, 9)
    assert (subset.regions, subset.kept, subset.older, subset.missing) == (36, 24, 0, [])
    assert found.number == second and found.owner.state == status.RELEASED
    assert (found.run.command, found.run.units, found.run.left_s) == ("build", 3, None)


def test_the_status_names_units_whose_files_are_missing(rebuilt):
    out, _, _, _ = rebuilt
    Path(out, "coconut/shards/coconut-000001.tar").unlink()
    assert status.Watcher(out).read().subsets[0].missing == ["coconut/coconut-000001"]


def test_the_status_tells_who_owns_the_corpus_and_what_was_held_back(rebuilt):
    out, _, _, _ = rebuilt
    watcher = status.Watcher(out)
    with own(out, "build", 60) as owner:
        found = watcher.read().owner
        assert (found.state, found.claim.command) == (status.ALIVE, "build") and found.beat_age_s < 60
        owner.held_back["coconut/coconut-000001"] = "the server does not answer"
    assert watcher.read().held_back == {"coconut/coconut-000001": "the server does not answer"}
    assert watcher.read().owner.state == status.RELEASED


def test_an_owner_of_another_machine_gives_no_sign_of_life_after_a_lease(rebuilt, monkeypatch):
    out, _, _, _ = rebuilt
    state = log.read_state(out)
    Owner(out, state).append(Claim(command="build", host="elsewhere", boot="b", process="p/1/1", pid=1))
    found = status.Watcher(out).read().owner
    assert (found.state, found.beat_age_s) == (status.SILENT, None)


def test_the_rate_of_a_run_is_that_of_the_times_in_the_log(rebuilt):
    out, _, _, _ = rebuilt
    name, (unit, _) = next(iter(log.read_state(out).units.items()))
    commits = [Commit(number=number, time_s=100 + 60 * number, units={name: unit}) for number in (1, 2, 3)]
    claim = Claim(number=0, time_s=0, command="build", host="h", boot="b", process="p", pid=1)
    found = status._rate(claim, commits, pending=4)
    assert (found.units, found.units_per_min, found.left_s) == (3, 1, 240)
    assert found.regions_per_min == unit.regions


def test_a_corpus_of_a_release_without_a_log_has_a_status_and_its_configuration_is_kept(rebuilt):
    out, _, _, before = rebuilt
    take_back(out)
    for name in (log.LOG, log.BEAT, log.REPLACED):
        shutil.rmtree(f"{out}/{name}")
    found = status.Watcher(out).read()
    assert (found.number, found.owner, found.subsets[0].units) == (0, None, 3)
    with own(out, "build", 1):
        pass
    state = log.read_state(out)
    assert state.config is not None and state.config.text == (Path(out) / "config.yaml").read_text()
    assert msgspec.structs.asdict(state.config.files[0])["temporary"] == ""
    assert files_of(out) == before | {"corpus.json": files_of(out)["corpus.json"]}
