"""The door for writing: one winner for a name, files whole and durable, nothing left behind by errors."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from paracaption.pipeline.io import store as module
from paracaption.pipeline.io.store import FolderStore, store_of, temporary_name
from paracaption.schemas.errors import ConfigError

STORE = FolderStore()


class Calls:
    """Stands for the module `os` in `store.py`: writes down what it is asked, and fails where it is told to.

    Args:
        failing: by name of a function, what it raises.
        after: of these, the ones that do what they are asked before they raise: a lost answer.
    """

    def __init__(self, failing: dict[str, OSError] | None = None, after: tuple[str, ...] = ()):
        self.failing, self.after, self.log = failing or {}, after, []
        self._opened: dict[int, str] = {}

    def __getattr__(self, name: str):
        real = getattr(os, name)
        if not callable(real):
            return real

        def call(*args, **options):
            self.log.append((name, self._name(args[0]) if args else ""))
            if name in self.failing and name not in self.after:
                raise self.failing[name]
            done = real(*args, **options)
            if name == "close":
                self._opened.pop(args[0], None)
            if name == "open":
                self._opened[done] = args[0]
            if name in self.failing:
                raise self.failing[name]
            return done

        return call

    def _name(self, what) -> str:
        """A path or a descriptor in words: "temporary" is a file that has not got its name yet."""
        if isinstance(what, int):
            what = self._opened.get(what) or os.readlink(f"/proc/self/fd/{what}")
        name = os.path.basename(str(what))
        return "temporary" if name.startswith(".tmp-") else name


@pytest.fixture
def calls(monkeypatch):
    def put(*args, **options) -> Calls:
        found = Calls(*args, **options)
        monkeypatch.setattr(module, "os", found)
        return found

    return put


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# One winner.


def test_of_sixteen_threads_one_creates_a_file(tmp_path):
    for turn in range(20):
        path, barrier, won = str(tmp_path / f"{turn}.json"), threading.Barrier(16), []

        def create(number: int, path=path, barrier=barrier, won=won) -> None:
            barrier.wait()
            if STORE.create(path, b"%d" % number):
                won.append(number)

        threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert Path(path).read_bytes() == b"%d" % won[0]
    assert names(tmp_path) == sorted(f"{turn}.json" for turn in range(20))


_CREATE = """
import sys
from paracaption.pipeline.io.store import FolderStore
folder, number = sys.argv[1], sys.argv[2]
print("ready", flush=True)
for turn, _ in enumerate(sys.stdin):
    print(FolderStore().create(f"{folder}/{turn}.json", number.encode()), flush=True)
"""


@pytest.mark.soak
def test_of_four_processes_one_creates_a_file(tmp_path):
    command = [sys.executable, "-c", _CREATE, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    processes = [subprocess.Popen([*command, str(number)], **pipes) for number in range(4)]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
        for turn in range(20):
            for process in processes:
                process.stdin.write("go\n")
            answers = [process.stdout.readline() for process in processes]
            assert sorted(answers) == ["False\n"] * 3 + ["True\n"]
            assert (tmp_path / f"{turn}.json").read_text() == str(answers.index("True\n"))
    finally:
        for process in processes:
            process.communicate()
    assert [process.returncode for process in processes] == [0] * 4
    assert len(names(tmp_path)) == 20


def test_a_file_is_moved_once(tmp_path):
    source, barrier, moved = tmp_path / ".tmp-a", threading.Barrier(8), []
    source.write_bytes(b"a")

    def move() -> None:
        barrier.wait()
        moved.append(STORE.move(str(source), str(tmp_path / "to" / "a")))

    threads = [threading.Thread(target=move) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(moved) == [False] * 7 + [True]
    assert names(tmp_path) == ["to/a"]


# Answers that are lost.


def test_a_name_that_is_taken_by_other_content_is_refused_and_stays(tmp_path):
    path = tmp_path / "log" / "1.json"
    assert STORE.create(str(path), b"first")
    assert not STORE.create(str(path), b"second")
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["log/1.json"]


def test_a_name_that_is_taken_by_ones_own_content_is_a_lost_answer(tmp_path):
    """A record carries a nonce, so nobody else's has the same bytes."""
    path = tmp_path / "1.json"
    assert STORE.create(str(path), b"mine")
    assert STORE.create(str(path), b"mine")
    assert names(tmp_path) == ["1.json"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_an_error_after_the_link_was_made_is_a_success(tmp_path, calls, number):
    calls({"link": OSError(number, os.strerror(number))}, after=("link",))
    assert STORE.create(str(tmp_path / "1.json"), b"mine")
    assert (tmp_path / "1.json").read_bytes() == b"mine"
    assert names(tmp_path) == ["1.json"]


def test_already_exists_after_the_link_was_made_is_a_success(tmp_path, calls):
    calls({"link": FileExistsError(errno.EEXIST, "File exists")}, after=("link",))
    assert STORE.create(str(tmp_path / "1.json"), b"mine")
    assert names(tmp_path) == ["1.json"]


def test_a_taken_name_that_is_gone_when_it_is_looked_at_is_not_ours(tmp_path, calls):
    calls({"link": FileExistsError(errno.EEXIST, "File exists")})
    assert not STORE.create(str(tmp_path / "1.json"), b"mine")
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_a_file_system_without_hard_links_is_named_in_one_line(tmp_path, calls, number):
    calls({"link": OSError(number, os.strerror(number))})
    path = str(tmp_path / "1.json")
    with pytest.raises(OSError, match=r"no hard links .* choose another `out`") as raised:
        STORE.create(path, b"mine")
    assert (raised.value.errno, raised.value.filename) == (number, path)
    assert "\n" not in str(raised.value)
    assert names(tmp_path) == []


# What each call does.


@pytest.mark.soak
def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "beat"
    sizes, ended = set(), threading.Event()
    STORE.put(str(path), b"a" * 100_000)

    def read() -> None:
        while not ended.is_set():
            data = STORE.read(str(path))
            sizes.add((len(data), len(set(data))))
            time.sleep(0.0005)  # or the interpreter's lock slows the writer down a hundredfold

    thread = threading.Thread(target=read)
    thread.start()
    for turn in range(100):
        STORE.put(str(path), b"%d" % (turn % 10) * 50_000 if turn % 2 else b"a" * 100_000)
    ended.set()
    thread.join()
    assert sizes <= {(100_000, 1), (50_000, 1)}
    assert names(tmp_path) == ["beat"]


def test_a_kept_file_stays_when_its_first_name_gets_another(tmp_path):
    path, kept = tmp_path / "shards" / "a.tar", tmp_path / ".replaced" / "7" / "a.tar"
    STORE.put(str(path), b"old")
    assert STORE.keep(str(path), str(kept))
    STORE.put(str(path), b"new")
    assert (path.read_bytes(), kept.read_bytes()) == (b"new", b"old")
    assert STORE.keep(str(path), str(kept))  # whoever comes second
    assert kept.read_bytes() == b"old"
    assert not STORE.keep(str(tmp_path / "none"), str(tmp_path / "kept"))
    assert names(tmp_path) == [".replaced/7/a.tar", "shards/a.tar"]


def test_what_is_deleted_twice_is_deleted(tmp_path):
    path = str(tmp_path / "a")
    STORE.put(path, b"a")
    STORE.delete(path)
    STORE.delete(path)
    STORE.delete_folder(str(tmp_path / "none"))
    assert STORE.size(path) is None
    with pytest.raises(FileNotFoundError):
        STORE.read(path)


def test_what_is_not_there_has_no_size_and_no_names(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert STORE.size(str(tmp_path / "file")) == 3
    assert STORE.size(str(tmp_path / "file" / "below")) is None
    assert STORE.list(str(tmp_path / "none")) == []
    assert STORE.list(str(tmp_path / "file")) == []
    assert STORE.list(str(tmp_path)) == ["file"]


def test_a_file_that_is_written_piece_by_piece_needs_a_free_name(tmp_path):
    path = str(tmp_path / "a" / ".tmp-a")
    with STORE.write(path) as file:
        file.write(b"one ")
        file.write(b"two")
    assert STORE.read(path) == b"one two"
    with pytest.raises(FileExistsError):
        STORE.write(path)


def test_temporary_names_differ_and_are_hidden():
    found = {temporary_name("a/b/shard.tar") for _ in range(100)}
    assert len(found) == 100
    assert all(name.startswith("a/b/.tmp-shard.tar-") for name in found)


def test_a_url_of_a_scheme_that_cannot_be_written_is_refused(tmp_path):
    assert isinstance(store_of(tmp_path), FolderStore)
    with pytest.raises(ConfigError, match="cannot be written to ftp://"):
        store_of("ftp://host/out")


# Order, and what an error leaves.


def durable(log: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [each for each in log if each[0] in ("fsync", "link", "replace", "unlink")]


def test_a_created_file_is_flushed_before_it_is_named_and_its_folder_after(tmp_path, calls):
    recorded = calls()
    STORE.create(str(tmp_path / "1.json"), b"mine")
    assert durable(recorded.log) == [
        ("fsync", "temporary"),
        ("link", "temporary"),
        ("unlink", "temporary"),
        ("fsync", tmp_path.name),
    ]


def test_a_replaced_file_is_flushed_before_it_is_named_and_its_folder_after(tmp_path, calls):
    recorded = calls()
    STORE.put(str(tmp_path / "beat"), b"mine")
    assert durable(recorded.log) == [
        ("fsync", "temporary"),
        ("replace", "temporary"),
        ("fsync", tmp_path.name),
    ]


def test_a_written_file_and_its_name_are_flushed_when_it_is_closed(tmp_path, calls):
    """A record names it next: it must be found after a power cut."""
    recorded = calls()
    with STORE.write(temporary_name(str(tmp_path / "a.tar"))) as file:
        file.write(b"a" * 3_000_000)
        assert durable(recorded.log) == []
    assert durable(recorded.log) == [("fsync", "temporary"), ("fsync", tmp_path.name)]


def test_new_names_are_flushed(tmp_path, calls):
    for name in ("a", "kept/b", "moved/b"):
        STORE.put(str(tmp_path / name), b"a")
    recorded = calls()
    STORE.keep(str(tmp_path / "a"), str(tmp_path / "kept" / "a"))
    STORE.move(str(tmp_path / "a"), str(tmp_path / "moved" / "a"))
    assert durable(recorded.log) == [("link", "a"), ("fsync", "kept"), ("replace", "a"), ("fsync", "moved")]


PLACES = [("create", "link"), ("create", "fsync"), ("put", "fsync"), ("put", "replace")]


def test_the_names_of_new_folders_are_flushed_before_a_file_lies_in_them(tmp_path, calls):
    recorded = calls()
    STORE.create(str(tmp_path / "out" / "log" / "1.json"), b"mine")
    flushed = [each for each in recorded.log if each[0] == "fsync"]
    assert flushed == [("fsync", tmp_path.name), ("fsync", "out"), ("fsync", "temporary"), ("fsync", "log")]
    recorded.log.clear()
    STORE.make_folder(str(tmp_path / "out" / "log"))
    assert durable(recorded.log) == []


def test_a_folder_is_not_made_where_a_file_lies(tmp_path):
    (tmp_path / "out").write_bytes(b"a file")
    with pytest.raises(FileExistsError):
        STORE.make_folder(str(tmp_path / "out"))
    with pytest.raises(NotADirectoryError):
        STORE.make_folder(str(tmp_path / "out" / "log"))


def test_a_relative_folder_is_made_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    STORE.put("beat", b"a")
    STORE.put("out/beat/1", b"a")
    STORE.make_folder("made/")
    assert names(tmp_path) == ["beat", "out/beat/1"]
    assert (tmp_path / "made").is_dir()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize(("what", "call"), PLACES)
@pytest.mark.soak(keep=5)
def test_an_error_leaves_nothing_behind_and_the_old_file(tmp_path, calls, what, call, number):
    path = tmp_path / "a"
    if what == "put":
        path.write_bytes(b"old")
    calls({call: OSError(number, os.strerror(number))})
    with pytest.raises(OSError) as raised:
        getattr(STORE, what)(str(path), b"new")
    assert raised.value.errno == number
    assert names(tmp_path) == (["a"] if what == "put" else [])
    if what == "put":
        assert path.read_bytes() == b"old"


@pytest.mark.parametrize("what", ["create", "put"])
def test_a_disk_that_is_full_while_the_content_is_written_keeps_nothing_of_it(tmp_path, monkeypatch, what):
    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module._Durable, "write", write, raising=False)
    with pytest.raises(OSError, match="No space left"):
        getattr(STORE, what)(str(tmp_path / "a"), b"new")
    assert names(tmp_path) == []


@pytest.mark.parametrize("what", ["create", "put"])
def test_an_interrupt_leaves_nothing_behind(tmp_path, calls, what):
    call = {"create": "link", "put": "replace"}[what]
    recorded = calls()
    recorded.failing = {call: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        getattr(STORE, what)(str(tmp_path / "a"), b"new")
    assert names(tmp_path) == []


def test_a_move_that_fails_leaves_both_files(tmp_path, calls):
    (tmp_path / ".tmp-a").write_bytes(b"new")
    (tmp_path / "a").write_bytes(b"old")
    calls({"replace": OSError(errno.EIO, "Input/output error")})
    with pytest.raises(OSError, match="Input/output"):
        STORE.move(str(tmp_path / ".tmp-a"), str(tmp_path / "a"))
    assert ((tmp_path / "a").read_bytes(), (tmp_path / ".tmp-a").read_bytes()) == (b"old", b"new")


@pytest.mark.parametrize("call", ["link", "replace"])
def test_a_file_whose_temporary_name_is_swept_is_written_again(tmp_path, monkeypatch, call):
    """A driver that is about to claim a corpus writes beside its owner, who sweeps."""
    real, swept = getattr(os, call), []

    def sweep_first(temporary: str, path: str) -> None:
        if len(swept) < 2:
            os.unlink(temporary)
            swept.append(temporary)
        real(temporary, path)

    monkeypatch.setattr(module.os, call, sweep_first)
    path = str(tmp_path / "a.json")
    (STORE.create if call == "link" else STORE.put)(path, b"a")
    assert STORE.read(path) == b"a" and len(set(swept)) == 2
    assert names(tmp_path) == ["a.json"]
