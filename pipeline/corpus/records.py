"""The records of a commit log: what each kind says, and how it lies on the disk.

A record is a line of JSON, `{"sha256": ..., "record": {...}}`: a changed byte is noticed. Records say when
and by whom, so two builds of equal corpora have different logs; everything that they name is equal to the
byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import msgspec

from ...schemas.errors import IntegrityError


def is_inside(path: str) -> bool:
    """Whether a path below the corpus stays there: a record is data, and names nothing elsewhere."""
    parts = path.split("/")
    return not {"", ".", ".."}.intersection(parts) and "\0" not in path


class LogFile(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A file that a record makes part of the corpus.

    Attributes:
        path: below the corpus, such as "coconut/shards/coconut-000000.tar".
        bytes: its size.
        sha256: of its content, in hex.
        temporary: the name, below the corpus, under which it was written; it is moved to `path` once the
            record stands. Empty if it was there before the record.
        name: the name, below the corpus, that it has for good where nothing can be moved, as in a bucket.
            Empty if that is `path`.
    """

    path: str
    bytes: int
    sha256: str
    temporary: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        for path in (self.path, self.temporary or self.path, self.name or self.path):
            if not is_inside(path):
                raise ValueError(f"{path!r}: not a file of a corpus")

    @property
    def place(self) -> str:
        """Where it lies, below the corpus, once it has been moved."""
        return self.name or self.path

    @property
    def written_as(self) -> str:
        """The name, below the corpus, under which it was written."""
        return self.name or self.temporary or self.path


class LogUnit(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A committed unit.

    Attributes:
        plan: digest of the work list.
        recipe: digest of the recipe.
        regions: number of regions that the source declares.
        kept: number of regions in the shard.
        manifest: the file of the manifest.
        ledger: the file of the ledger.
        shard: the shard; None if no region was kept.
        failed: whether it holds drops by error, which `--retry-failed` runs again.
    """

    plan: str
    recipe: str
    regions: int
    kept: int
    manifest: LogFile
    ledger: LogFile
    shard: LogFile | None = None
    failed: bool = False

    def files(self) -> Iterator[LogFile]:
        """Its files, in the order in which they are moved: the manifest is last."""
        if self.shard is not None:
            yield self.shard
        yield self.ledger
        yield self.manifest


def check_names(units: dict[str, LogUnit]) -> None:
    """Raise ValueError if a unit, by "subset/unit", has other files than its own."""
    for name, unit in units.items():
        subset, _, unit_name = name.partition("/")
        places = [f"{subset}/manifests/{unit_name}.json", f"{subset}/ledger/{unit_name}.parquet"]
        found = [unit.manifest.path, unit.ledger.path]
        if unit.shard is not None:
            places.append(f"{subset}/shards/{unit_name}.tar")
            found.append(unit.shard.path)
        if "/" in unit_name or found != places:
            raise ValueError(f"unit {name!r} has other files than its own")


class _Record(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True, tag_field="kind", kw_only=True):
    """What all records have in common.

    Attributes:
        number: its place in the log, which is its file's name.
        epoch: which driver wrote it: the number of claims so far.
        nonce: tells an attempt to write from another driver's; random.
        time_s: when, in seconds since the Unix epoch, by that driver's clock. Decides nothing.
    """

    number: int = 0
    epoch: int = 0
    nonce: str = ""
    time_s: float = 0.0


class Claim(_Record, tag="claim"):
    """A driver takes the corpus over.

    Attributes:
        command: what it does: "build", "merge" or "undo".
        host: name of its machine.
        boot: changes when that machine starts again; empty where the system does not say.
        process: its process, with its name space and the moment it started; see `processes`.
        pid: its process id, for people.
    """

    command: str
    host: str
    boot: str
    process: str
    pid: int


class Planned(_Record, tag="planned"):
    """A subset's work list from here on.

    Attributes:
        subset: its name.
        plan: digest of the work list.
        units, images: how many it has.
        files: `plan/plan.parquet` and `plan/plan.json` of the subset.
        added, changed: of these images, how many are new in a list that has grown, and how many are not what
            they were.
        gone: how many its sources do not have any more; they stay in the corpus.
        removed: how many were taken out of the corpus on request.
        removed_from: names of the units that had them; no undo gives these units files of before.
    """

    subset: str
    plan: str
    units: int
    images: int
    files: list[LogFile]
    added: int = 0
    changed: int = 0
    gone: int = 0
    removed: int = 0
    removed_from: list[str] = []


class Config(_Record, tag="config"):
    """The configuration from here on.

    Attributes:
        text: of `config.yaml`, so that the configuration of every version is known.
        files: `config.yaml`.
    """

    text: str
    files: list[LogFile]


class Sweep(_Record, tag="sweep"):
    """Nobody has claimed the corpus since its files were listed.

    So what that list has and no record names may be deleted.
    """


class Commit(_Record, tag="commit"):
    """Units from here on.

    Attributes:
        units: by "subset/unit".
        replaced: paths of the files of their former versions, which go to `.replaced/<number>/`.
        undoes: number of the first record that these units take back; 0 if they are new.
    """

    units: dict[str, LogUnit]
    replaced: list[str] = []
    undoes: int = 0

    def __post_init__(self) -> None:
        check_names(self.units)
        if not all(map(is_inside, self.replaced)):
            raise ValueError("it replaces files outside of the corpus")


class Adopt(_Record, tag="adopt"):
    """Units that lay in the folder before it had a log."""

    units: dict[str, LogUnit]
    files: list[LogFile]

    def __post_init__(self) -> None:
        check_names(self.units)


class Merged(_Record, tag="merged"):
    """Index, statistics, plots and card, of the units as of the record before it."""

    files: list[LogFile]


class Done(_Record, tag="done"):
    """The driver has released the corpus.

    Attributes:
        held_back: units that were not committed, by "subset/unit", and why.
    """

    held_back: dict[str, str] = {}


class Checkpoint(_Record, tag="checkpoint"):
    """Everything that the records before it say; each hundredth record is one, so that readers start there.

    Attributes:
        units: every committed unit.
        since: the record that committed each unit.
        files: of records before it, by path: those that are no unit's.
        config: the newest configuration record.
        merged: the newest record of an index.
        claim: the newest claim.
        released: whether its driver has released the corpus.
        unmoved: number of the newest record with files; 0 if there is none.
    """

    units: dict[str, LogUnit]
    since: dict[str, int]
    files: dict[str, LogFile] = {}
    config: Config | None = None
    merged: Merged | None = None
    claim: Claim | None = None
    released: bool = True
    unmoved: int = 0

    def __post_init__(self) -> None:
        check_names(self.units)


Record = Claim | Planned | Config | Sweep | Commit | Adopt | Merged | Done | Checkpoint


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    sha256: str
    record: msgspec.Raw


_LINE = msgspec.json.Decoder(_Line)
_RECORD: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def encode(record: Record) -> bytes:
    """The file of a record."""
    return _line(msgspec.json.encode(record))


def _line(record: bytes) -> bytes:
    return msgspec.json.encode(_Line(hashlib.sha256(record).hexdigest(), msgspec.Raw(record))) + b"\n"


def decode(data: bytes, path: str) -> Record:
    """A record from its file; `path` is for the message.

    Raises:
        IntegrityError: the file is damaged, or of a release that this one does not know.
    """
    try:
        line = _LINE.decode(data)
        if data != _line(bytes(line.record)):
            raise msgspec.ValidationError("its checksum is not that of its content")
        return _RECORD.decode(line.record)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        what = "restore it from a copy; what is committed cannot be told without it"
        raise IntegrityError(f"{path}: not a record of the commit log ({error}); {what}") from error
