"""Corpora that strangers have made up to lead a reader out of their folder, and a watch on what is opened.

Each function takes a copy of a good corpus, and a folder beside it with what must not be opened.
"""

import ctypes
import ctypes.util
import io
import json
import os
import struct
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

KEPT, DROPPED = "000000000001", "000000000002"
"""An image with kept regions, and one whose photo is looked for where the work list has it."""

COLOR = (250, 10, 21)
UNIT = "coconut/{}/coconut-000000.{}"

Change = Callable[[Path, Path], None]
CORPORA: dict[str, Change] = {}


def hostile(change: Change) -> Change:
    CORPORA[change.__name__] = change
    return change


def lay_out(outside: Path, out: Path) -> None:
    """What lies beside the corpus: a picture, and a file of each kind that a corpus has."""
    (outside / "folder").mkdir(parents=True)
    Image.new("RGB", (128, 96), COLOR).save(outside / "private.png")
    for kind, ending in (("shards", "tar"), ("ledger", "parquet"), ("manifests", "json")):
        (outside / f"{kind}.{ending}").write_bytes((out / UNIT.format(kind, ending)).read_bytes())
    for name in ("index.parquet", "stats.json", "config.yaml"):
        (outside / name).write_bytes((out / name).read_bytes())
    for name in ("one.jsonl", "coconut-000000.parquet", "marks.parquet", "lock", "plan.json"):
        (outside / "folder" / name).write_bytes(b"{}")


def without_log(out: Path) -> None:
    """As a corpus of the first release, whose manifests alone say what is committed."""
    for folder in ("log", "beat"):
        for path in (out / folder).iterdir():
            path.unlink()
        (out / folder).rmdir()


def ledger(out: Path, **columns: Any) -> None:
    """Every row of the first unit's ledger with these values."""
    path = out / UNIT.format("ledger", "parquet")
    _rewrite(path, columns, None)


def index(out: Path, **columns: Any) -> None:
    _rewrite(out / "index.parquet", columns, None)


def plan(out: Path, **columns: Any) -> None:
    """The same for the work list, whose checks its author has brought into line."""
    path = out / "coconut/plan/plan.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["check"]), path)
    _rewrite(path, columns, 5)
    said = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(said | {"check": "", "table": ""}))


def _rewrite(path: Path, columns: dict[str, Any], group: int | None) -> None:
    table = pq.read_table(path)
    for name, value in columns.items():
        place = table.schema.get_field_index(name)
        kind = table.schema.field(name)
        table = table.set_column(place, kind, pa.array([value] * table.num_rows, kind.type))
    pq.write_table(table, path, row_group_size=group)


def manifest(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = out / UNIT.format("manifests", "json")
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))
    without_log(out)


def sample(out: Path, **fields: Any) -> None:
    """The first sample of the first shard with other fields; sizes in manifest and log are not believed."""
    path = out / UNIT.format("shards", "tar")
    members = []
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            members.append((member.name, file.read()))
    with tarfile.open(path, "w") as tar:
        for place, (name, data) in enumerate(members):
            if place == 1:
                data = json.dumps(json.loads(data) | fields).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def member(out: Path, name: str, kind: bytes, target: str = "") -> None:
    """A shard that begins with a member of a kind."""
    path = out / UNIT.format("shards", "tar")
    with tarfile.open(path, "w") as tar:
        found = tarfile.TarInfo(name)
        found.type, found.linkname = kind, target
        tar.addfile(found)


def link(path: Path, target: Path) -> None:
    """A link in the place of a file or folder of the corpus."""
    if path.exists():
        path.rename(path.with_name(f"was-{path.name}"))
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)


for _name, _url in {
    "dots": "../../outside/private.png",
    "an_absolute_path": "{}/private.png",
    "a_file_url": "file://{}/private.png",
    "a_url": "http://127.0.0.1:{port}/private.png",
}.items():

    def _shard(out: Path, outside: Path, url: str = _url) -> None:
        length = (outside / "private.png").stat().st_size
        ledger(out, shard=at(url, outside), photo_offset=0, photo_length=length)

    def _photo(out: Path, outside: Path, url: str = _url) -> None:
        plan(out, photo_url=at(url, outside), photo_offset=0, photo_length=None)

    def _index_shard(out: Path, outside: Path, url: str = _url) -> None:
        index(out, shard=at(url, outside))

    CORPORA[f"ledger_names_shard_by_{_name}"] = _shard
    CORPORA[f"work_list_names_photo_by_{_name}"] = _photo
    CORPORA[f"index_names_shard_by_{_name}"] = _index_shard

for _name, _url in {
    "chained_url": "simplecache::http://127.0.0.1:{port}/private.png",
    "chained_path": "filecache::file://{}/private.png",
    "secure_url": "https://127.0.0.1:{port}/latest/meta-data",
    "zeros": "/dev/zero",
    "link": "{out}/coconut/photo.png",
    "pipe": "{out}/coconut/pipe",
}.items():

    def _other_photo(out: Path, outside: Path, url: str = _url) -> None:
        (out / "coconut/photo.png").symlink_to(outside / "private.png")
        os.mkfifo(out / "coconut/pipe")
        plan(out, photo_url=at(url, outside, out), photo_offset=0, photo_length=None)

    CORPORA[f"work_list_names_{_name}"] = _other_photo

for _column, _value in {"subset": "../../outside", "unit": "../../outside/shards", "key": "../x"}.items():

    def _of_ledger(out: Path, _: Path, column: str = _column, value: str = _value) -> None:
        ledger(out, **{column: value})

    def _of_index(out: Path, _: Path, column: str = _column, value: str = _value) -> None:
        index(out, **{column: value})

    CORPORA[f"ledger_with_a_path_as_{_column}"] = _of_ledger
    CORPORA[f"index_with_a_path_as_{_column}"] = _of_index

for _field, _value in {
    "key": "../../../evil",
    "subset": "../../../evil",
    "photo_format": "../../../evil",
    "file_name": "../../../evil",
}.items():

    def _of_sample(out: Path, _: Path, field: str = _field, value: str = _value) -> None:
        sample(out, **{field: value})

    CORPORA[f"sample_with_a_path_as_{_field}"] = _of_sample

for _place, _target in {
    UNIT.format("shards", "tar"): "shards.tar",
    UNIT.format("ledger", "parquet"): "ledger.parquet",
    UNIT.format("manifests", "json"): "manifests.json",
    **{name: name for name in ("index.parquet", "stats.json", "config.yaml")},
    **dict.fromkeys(("coconut", "coconut/shards", "coconut/ledger", "coconut/manifests"), "folder"),
    **dict.fromkeys(("coconut/plan", "coconut/evidence", "events", "log", "beat", "plots"), "folder"),
    "review": "folder",
    "README.md": "private.png",
    "report.html": "private.png",
}.items():

    def _link(out: Path, outside: Path, place: str = _place, target: str = _target) -> None:
        link(out / place, outside / target)

    CORPORA[f"link_as_{_place.replace('/', '_')}"] = _link


@hostile
def manifest_names_shard_elsewhere(out: Path, _: Path) -> None:
    manifest(out, lambda said: said["shard"].update(path="../../outside/shards.tar"))


@hostile
def manifest_names_ledger_elsewhere(out: Path, _: Path) -> None:
    manifest(out, lambda said: said["ledger"].update(path="../../outside/ledger.parquet"))


@hostile
def manifest_names_shard_by_its_path(out: Path, outside: Path) -> None:
    manifest(out, lambda said: said["shard"].update(path=f"{outside}/shards.tar"))


@hostile
def manifest_of_a_unit_elsewhere(out: Path, _: Path) -> None:
    manifest(out, lambda said: said.update(unit="../../outside/shards"))


@hostile
def shard_with_a_link(out: Path, outside: Path) -> None:
    member(out, f"{KEPT}.jpg", tarfile.SYMTYPE, f"{outside}/private.png")


@hostile
def shard_with_a_hard_link(out: Path, outside: Path) -> None:
    member(out, f"{KEPT}.jpg", tarfile.LNKTYPE, f"{outside}/private.png")


@hostile
def shard_with_a_path_as_member(out: Path, _: Path) -> None:
    member(out, "../../../outside/evil.jpg", tarfile.REGTYPE)


@hostile
def shard_with_a_hole_of_a_terabyte(out: Path, _: Path) -> None:
    path = out / UNIT.format("shards", "tar")
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        found = tarfile.TarInfo(f"{KEPT}.jpg")
        found.pax_headers = {
            "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": found.name,
            "GNU.sparse.realsize": str(1 << 40),
        }  # fmt: skip
        data = b"1\n1099511627775\n1\n".ljust(512, b"\0") + b"x"
        found.size = len(data)
        tar.addfile(found, io.BytesIO(data))


@hostile
def mask_of_two_billion_pixels(out: Path, _: Path) -> None:
    region = {"id": 1, "rle": {"size": [46_000, 46_000], "counts": "0" * 9}, "bbox": [0, 0, 1, 1], "area": 1}
    sample(out, regions=[region | {"category": "", "core_category": "", "caption": "A thing."}])


@hostile
def pipe_as_ledger(out: Path, _: Path) -> None:
    path = out / UNIT.format("ledger", "parquet")
    path.unlink()
    os.mkfifo(path)


@hostile
def pipe_as_manifest(out: Path, _: Path) -> None:
    path = out / UNIT.format("manifests", "json")
    path.unlink()
    os.mkfifo(path)


@hostile
def configuration_names_photos_elsewhere(out: Path, outside: Path) -> None:
    path = out / "config.yaml"
    path.write_text(path.read_text().replace(str(out.parent), str(outside)) + "\n")


@hostile
def statistics_name_an_index_elsewhere(out: Path, _: Path) -> None:
    path = out / "stats.json"
    said = json.loads(path.read_text())
    said["index"]["path"] = "../outside/index.parquet"
    path.write_text(json.dumps(said))


_PORT = {"port": 9}


def listen_at(port: int) -> None:
    """The port of the server that nobody may ask."""
    _PORT["port"] = port


def at(url: str, outside: Path, out: Path = Path()) -> str:
    return url.format(outside, out=out, **_PORT)


# What is opened: Python's own opens by an audit hook, all others by inotify.

_SEEN: list[tuple[str, str]] = []
_WATCHING = [False]


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _WATCHING[0]:
        return
    if event in ("open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.mkdir", "os.link"):
        paths = args[: 2 if event in ("os.rename", "os.link") else 1]
        _SEEN.extend((event, os.fsdecode(each)) for each in paths if isinstance(each, str | bytes))
    elif event == "socket.connect":
        _SEEN.append((event, str(args[1])))


@contextmanager
def watched(outside: Path) -> Iterator[list[tuple[str, str]]]:
    """What is opened, listed, changed or connected to while the block runs, as (event, path or address)."""
    if not _SEEN:
        sys.addaudithook(_hook)
        _SEEN.append(("", ""))
    del _SEEN[1:]
    found: list[tuple[str, str]] = []
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    assert descriptor >= 0
    for folder in (outside, outside / "folder"):
        assert libc.inotify_add_watch(descriptor, bytes(folder), 0xFFF & ~0x18) >= 0
    _WATCHING[0] = True
    try:
        yield found
    finally:
        _WATCHING[0] = False
        found += _SEEN[1:]
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            data = b""
        os.close(descriptor)
        while data:
            _, mask, _, length = struct.unpack_from("iIII", data)
            name = data[16 : 16 + length].rstrip(b"\0").decode()
            found.append(("inotify", f"{outside}/{name} {mask:#x}"))
            data = data[16 + length :]
