"""Checks one unit of a corpus: manifest, checksums, ledger, shard, masks, captions. Called by `verify`."""

from __future__ import annotations

import hashlib
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

from ...filters import rle, text
from ...schemas.config import Text
from ...schemas.errors import REBUILD, BadRecord, IntegrityError, ParaCaptionError
from ...schemas.manifest import FileEntry, Manifest
from ...schemas.records import CREDIT_FIELDS, Blob
from ...schemas.sample import PHOTO_ENDING, Sample, SampleRegion
from ..io import files, photos
from ..io.disk_errors import fix_of
from ..io.holding import hold
from ..io.orientation import restore
from . import reader
from .problems import Problem, compare_file, guarded, what_is_wrong
from .reader import SAFE_KEY, Unit
from .records import LogFile, LogUnit

EXAMPLES = 20
"""Problems of one kind that are listed for one unit; the rest are counted."""

_HEADER_PX = 1 << 31

_Row = dict[str, Any]


class UnitHead(NamedTuple):
    """What `verify` remembers of a checked manifest. Its images are left out: there may be millions."""

    plan: str
    recipe: str
    keys: str
    regions: int


class UnitCheck:
    """Collects the problems of a unit, a limited number of each kind.

    Args:
        unit: the unit.
    """

    def __init__(self, unit: Unit):
        self.out = unit.folder.rpartition("/")[0]
        self.unit = unit
        self.subset = unit.subset
        self.manifest, self.ledger, self.shard = map(self._below, (unit.manifest, unit.ledger, unit.shard))
        self.problems: list[Problem] = []
        self._seen: Counter[tuple[str, str]] = Counter()

    def _below(self, path: str) -> str:
        return path.removeprefix(f"{self.out}/")

    def url(self, path: str) -> str:
        """Where a file of the corpus lies."""
        return f"{self.out}/{path}"

    def files(self, logged: LogUnit | None) -> list[str]:
        """Where the files of the unit lie that are there according to the log."""
        has_shard = logged is not None and logged.shard is not None
        return [self.url(path) for path in (self.manifest, self.ledger, *([self.shard] if has_shard else []))]

    def report(self, path: str, record: str, what: str, kind: str = "") -> None:
        """Note a problem. Of one kind in one file only the first ones are listed, the others are counted."""
        self._seen[path, kind] += 1
        if not kind or self._seen[path, kind] <= EXAMPLES:
            self.problems.append(Problem(path, record, what))

    def finish(self) -> list[Problem]:
        """The problems, and a line for those that were only counted."""
        for (path, kind), count in self._seen.items():
            if kind and count > EXAMPLES:
                self.problems.append(Problem(path, "", f"{count - EXAMPLES} more of this kind: {kind}"))
        return self.problems


def check_unit(
    committed: Unit, logged: LogUnit | None, rules: Text | None, deep: bool
) -> tuple[UnitHead | None, list[Problem]]:
    """Check one unit; see `verify`. What is in a file is looked at only if its size and checksum are right.

    Args:
        committed: the unit.
        logged: what the log says of it; None if the corpus has no log, so that the manifest is the truth.
        rules: for captions; None leaves captions unchecked.
        deep: also check checksums, shard, photo headers, masks and captions.

    Returns:
        What to compare with the other units, None if the manifest cannot be read; and the problems.
    """
    unit = UnitCheck(committed)
    with ExitStack() as held:
        if deep:
            for url in unit.files(logged):
                held.enter_context(hold(url))
        head = _check(unit, logged, rules, deep)
    return head, unit.finish()


def _check(unit: UnitCheck, logged: LogUnit | None, rules: Text | None, deep: bool) -> UnitHead | None:
    head = None
    with guarded(unit.problems, unit.manifest, REBUILD):
        manifest = _read_manifest(unit, logged, deep)
        if manifest is not None:
            keys = keys_digest(manifest.images)
            head = UnitHead(manifest.plan, manifest.recipe, keys, manifest.regions_in)
            _check_manifest(unit, manifest, logged)
            _check_content(unit, manifest, rules, deep)
        elif logged is not None:
            _compare(unit, unit.ledger, logged.ledger, "the log", deep)
            if logged.shard is not None:
                _compare(unit, unit.shard, logged.shard, "the log", deep)
    return head


def _read_manifest(unit: UnitCheck, logged: LogUnit | None, deep: bool) -> Manifest | None:
    if logged is not None and not _compare(unit, unit.manifest, logged.manifest, "the log", deep):
        return None
    try:
        return reader.read_manifest(unit.url(unit.manifest))
    except (IntegrityError, OSError) as error:
        unit.report(unit.manifest, "", f"not a manifest ({error.__cause__ or error}); {REBUILD}")
        return None


def _check_content(unit: UnitCheck, manifest: Manifest, rules: Text | None, deep: bool) -> None:
    shard_ok = manifest.shard is not None and _check_file(unit, manifest.shard, unit.shard, "shards", deep)
    if not _check_file(unit, manifest.ledger, unit.ledger, "ledger", deep):
        return
    with guarded(unit.problems, unit.ledger, REBUILD):
        rows = _check_ledger(unit, manifest, deep)
        if rows is None or not deep:
            return
        _check_regions(unit, rows, rules)
        if shard_ok:
            with guarded(unit.problems, unit.shard, REBUILD):
                _check_shard(unit, rows)


def keys_digest(keys: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()


def _check_manifest(unit: UnitCheck, manifest: Manifest, logged: LogUnit | None) -> None:
    path = unit.manifest
    if manifest.unit != unit.unit.name:
        unit.report(path, "", f"belongs to unit {manifest.unit}; {REBUILD}")
    if manifest.subset != unit.subset:
        unit.report(path, "", f"belongs to subset {manifest.subset}; {REBUILD}")
    if logged is not None and _as_logged(logged) != _as_logged(manifest):
        unit.report(path, "", f"does not agree with the log about the unit and its files; {REBUILD}")
    dropped = sum(manifest.dropped.values())
    if manifest.regions_in != manifest.kept + dropped:
        what = f"regions_in {manifest.regions_in} is not kept {manifest.kept} + dropped {dropped}; {REBUILD}"
        unit.report(unit.manifest, "", what)
    if manifest.kept != sum(manifest.images.values()):
        unit.report(unit.manifest, "", f"kept {manifest.kept} is not the sum over its images; {REBUILD}")
    if (manifest.shard is None) != (manifest.kept == 0):
        names = "no shard" if manifest.shard is None else "a shard"
        unit.report(unit.manifest, "", f"names {names}, although {manifest.kept} regions are kept; {REBUILD}")


def _as_logged(record: LogUnit | Manifest) -> tuple:
    regions = record.regions if isinstance(record, LogUnit) else record.regions_in
    files_of = [file and (file.bytes, file.sha256) for file in (record.ledger, record.shard)]
    return record.plan, record.recipe, regions, record.kept, files_of


def _check_file(unit: UnitCheck, entry: FileEntry, path: str, folder: str, deep: bool) -> bool:
    """Whether a file of the unit is what its manifest says."""
    expected = f"{folder}/{unit.unit.name}.{'tar' if folder == 'shards' else 'parquet'}"
    if entry.path != expected:  # never opened: a manifest is data
        unit.report(unit.manifest, entry.path, f"names this file instead of {expected}; {REBUILD}")
        return False
    return _compare(unit, path, entry, "its manifest", deep)


def _compare(unit: UnitCheck, path: str, entry: FileEntry | LogFile, whose: str, deep: bool) -> bool:
    found = compare_file(unit.out, path, (entry.bytes, entry.sha256), whose, deep, REBUILD)
    unit.problems += found
    return not found


_COUNTED = ["unit", "subset", "key", "region", "kept", "drop_stage", "drop_reason"]


def _check_ledger(unit: UnitCheck, manifest: Manifest, deep: bool) -> list[_Row] | None:
    path = unit.ledger
    try:
        rows = reader.read_ledger(unit.url(path), None if deep else _COUNTED).to_pylist()
    except ParaCaptionError as error:
        unit.report(path, "", f"not a ledger: {what_is_wrong(error, unit.url(path))}; {REBUILD}")
        return None
    _compare_counts(unit, path, manifest, rows)
    return rows


def _compare_counts(unit: UnitCheck, path: str, manifest: Manifest, rows: list[_Row]) -> None:
    regions = [row for row in rows if row["region"] is not None]
    kept = [row for row in regions if row["kept"]]
    dropped = Counter(f"{row['drop_stage']}/{row['drop_reason']}" for row in regions if not row["kept"])
    for name, expected, counted in (
        ("regions", manifest.regions_in, len(regions)),
        ("kept regions", manifest.kept, len(kept)),
        ("drops by reason", dict(manifest.dropped), dict(dropped)),
    ):
        if expected != counted:
            unit.report(path, "", f"{name}: {counted}, its manifest says {expected}; {REBUILD}")
    found = {row["key"] for row in rows}
    if found != manifest.images.keys():
        unit.report(
            path, "", f"{describe_difference(found, set(manifest.images), 'the manifest')}; {REBUILD}"
        )
    by_key = Counter(row["key"] for row in kept)
    for key, expected in manifest.images.items():
        if by_key[key] != expected:
            what = f"{by_key[key]} kept regions, its manifest says {expected}; {REBUILD}"
            unit.report(path, key, what, "number of kept regions")
    twice = Counter((row["key"], row["region"]) for row in rows)
    for (key, region), count in twice.items():
        if count > 1:
            unit.report(
                path, f"{key} #{region}", f"occurs {count} times; {REBUILD}", "region listed more than once"
            )
    for row in rows:
        if row["unit"] != manifest.unit or row["subset"] != unit.subset:
            unit.report(
                path,
                row["key"],
                f"belongs to {row['subset']}, unit {row['unit']}; {REBUILD}",
                "row of another unit",
            )
        if row["region"] is not None and row["kept"] == (row["drop_reason"] is not None):
            unit.report(
                path,
                _record(row),
                f"has to be either kept or have a drop reason; {REBUILD}",
                "kept or dropped",
            )


def describe_difference(found: set[str], expected: set[str], whose: str) -> str:
    groups = {f"of {whose} missing": expected - found, f"not in {whose}": found - expected}
    parts = [f"images {what}: {len(k)} ({', '.join(sorted(k)[:3])})" for what, k in groups.items() if k]
    return ", ".join(parts) or f"the images differ from those of {whose}"


def _record(row: _Row) -> str:
    return row["key"] if row["region"] is None else f"{row['key']} #{row['region']}"


def _check_regions(unit: UnitCheck, rows: list[_Row], rules: Text | None) -> None:
    """Masks of all regions, captions of the kept ones, as the ledger has them."""
    path = unit.ledger
    by_size: dict[tuple[int, int], list[_Row]] = {}
    for row in rows:
        if not SAFE_KEY.fullmatch(row["key"] or ""):
            unit.report(
                path, repr(row["key"]), f"not a key (letters, digits, _ and - only); {REBUILD}", "key"
            )
        if row["rle_counts"] is not None:
            by_size.setdefault((row["image_height"] or 0, row["image_width"] or 0), []).append(row)
        elif row["kept"]:
            unit.report(path, _record(row), f"kept without a mask; {REBUILD}", "mask")
        if row["kept"]:
            _check_caption(unit, path, row, rules)
    for (height, width), group in by_size.items():
        masks = rle.check_all(
            [{"counts": row["rle_counts"].encode(), "size": [height, width]} for row in group], height, width
        )
        for row, mask in zip(group, masks, strict=True):
            what = _mask_fault(mask, row)
            if what and (row["kept"] or not isinstance(mask, BadRecord)):
                unit.report(path, _record(row), f"{what}; {REBUILD}", "mask")


def _mask_fault(mask: rle.Mask | BadRecord, row: _Row) -> str | None:
    if isinstance(mask, BadRecord):
        return f"its RLE does not fill {row['image_width']}x{row['image_height']}: {mask.detail}"
    bbox = tuple(row[f"bbox_{name}"] for name in "xywh")
    if mask.area != row["area"]:
        return f"its mask has {mask.area} pixels, area says {row['area']}"
    if mask.bbox != bbox:
        return f"its mask's box is {mask.bbox}, bbox says {bbox}"
    return None


def _check_caption(unit: UnitCheck, path: str, row: _Row, rules: Text | None) -> None:
    if not row["caption"]:
        unit.report(path, _record(row), f"kept without a caption; {REBUILD}", "caption")
    elif rules is not None:
        verdict = text.clean(row["caption"], rules)
        if verdict.reason is not None:
            what = f"its caption breaks a text rule of config.yaml: {verdict.reason} ({verdict.detail})"
            unit.report(
                path,
                _record(row),
                f"{what}; run `paracaption build CONFIG` again, which applies the rules",
                "caption",
            )


# The shard.


def _check_shard(unit: UnitCheck, rows: list[_Row]) -> None:
    path = unit.shard
    kept: dict[str, list[_Row]] = {}
    for row in rows:
        if row["kept"]:
            kept.setdefault(row["key"], []).append(row)
    seen: list[str] = []
    try:
        for key, photo, record in _members(unit, path):
            seen.append(key)
            _check_sample(unit, path, key, photo, record, kept.get(key))
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        unit.report(path, "", f"not a readable tar ({error}); {fix_of(error, REBUILD)}")
        return
    if seen != sorted(set(seen)):
        unit.report(path, "", f"its samples are not sorted by key, or a key occurs twice; {REBUILD}")
    for key in sorted(kept.keys() - set(seen)):
        unit.report(
            path,
            key,
            f"has kept regions in the ledger and no sample; {REBUILD}",
            "kept regions without sample",
        )


_Part = tuple[tarfile.TarInfo, bytes]


def _members(unit: UnitCheck, path: str) -> Iterator[tuple[str, _Part, _Part]]:
    """The photo and the JSON of each key of a shard. Anything else in the shard is reported."""
    waiting: tuple[str, _Part] | None = None
    with files.open_url(unit.url(path), 1 << 20) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            key, _, ending = member.name.rpartition(".")
            if not member.isreg() or not SAFE_KEY.fullmatch(key) or ending not in (PHOTO_ENDING, "json"):
                unit.report(
                    path, repr(member.name), f"not a member of a shard; {REBUILD}", "member of another kind"
                )
                continue
            if (member.mtime, member.uid, member.gid, member.uname, member.gname) != (0, 0, 0, "", ""):
                unit.report(
                    path,
                    member.name,
                    f"its tar header has a time or an owner, which shards have not; {REBUILD}",
                    "time or owner",
                )
            content = tar.extractfile(member)
            part = (member, b"" if content is None else content.read())
            if len(part[1]) != member.size:
                raise tarfile.ReadError(f"{member.name} is cut short")
            if ending == PHOTO_ENDING:
                if waiting:
                    unit.report(
                        path, waiting[0], f"a photo without its JSON; {REBUILD}", "photo or JSON alone"
                    )
                waiting = key, part
            elif waiting and waiting[0] == key:
                yield key, waiting[1], part
                waiting = None
            else:
                unit.report(
                    path, key, f"a JSON without its photo before it; {REBUILD}", "photo or JSON alone"
                )
    if waiting:
        unit.report(path, waiting[0], f"a photo without its JSON; {REBUILD}", "photo or JSON alone")


def _check_sample(
    unit: UnitCheck, path: str, key: str, photo: _Part, record: _Part, rows: list[_Row] | None
) -> None:
    try:
        sample = reader.decode_sample(record[1], key)
    except IntegrityError as error:
        unit.report(path, f"{key}.json", f"not a sample ({error.__cause__}); {REBUILD}", "sample")
        return
    if sample.key != key or sample.subset != unit.subset:
        unit.report(path, f"{key}.json", f"belongs to {sample.subset}/{sample.key}; {REBUILD}", "sample")
    _check_photo(unit, path, sample, photo[0])
    if rows is None:
        unit.report(
            path, key, f"no row of the ledger is kept for this sample; {REBUILD}", "sample without kept row"
        )
        return
    published = restore(photo[1], sample.exif_orientation)
    if {row["photo_digest"] for row in rows} - {None, photos.digest_of(published)}:
        what = "according to photo_digest in the ledger, another photo was captioned"
        unit.report(path, photo[0].name, f"{what}; {REBUILD}", "photo")
    places = (photo[0].offset_data, photo[0].size, record[0].offset_data, record[0].size)
    for row in rows:
        listed = (row["photo_offset"], row["photo_length"], row["json_offset"], row["json_length"])
        if listed != places or row["shard"] != f"shards/{unit.unit.name}.tar":
            what = f"the ledger says it lies in {row['shard'] or 'no shard'} at {listed}; it lies at {places}"
            unit.report(path, _record(row), f"{what}; {REBUILD}", "wrong place in the ledger")
    stated = {name: rows[0][name] for name in CREDIT_FIELDS if rows[0][name]}
    if stated != sample.credit():
        unit.report(
            path, key, f"its license or origin is not what the ledger says; {REBUILD}", "license or origin"
        )
    if [_of_row(row) for row in rows] != [_of_sample(sample, region) for region in sample.regions]:
        unit.report(path, key, f"its regions are not those that the ledger keeps; {REBUILD}", "regions")


def _check_photo(unit: UnitCheck, path: str, sample: Sample, member: tarfile.TarInfo) -> None:
    record = member.name
    try:
        header = photos.probe(Blob(unit.url(path), member.offset_data, member.size), _HEADER_PX)
    except BadRecord as error:
        unit.report(path, record, f"{error.reason}: {error.detail}; {REBUILD}", "photo")
        return
    if (header.format, header.width, header.height) != (sample.photo_format, sample.width, sample.height):
        listed = f"{sample.photo_format} {sample.width}x{sample.height}"
        what = f"the photo is {header.format} {header.width}x{header.height}, its JSON says {listed}"
        unit.report(path, record, f"{what}; {REBUILD}", "photo")


def _of_row(row: _Row) -> tuple:
    size = (row["image_height"], row["image_width"])
    bbox = tuple(row[f"bbox_{name}"] for name in "xywh")
    names = (row["category"] or "", row["core_category"] or "", row["caption"], row["file_name"])
    return (row["region"], size, row["rle_counts"], bbox, row["area"], *names)


def _of_sample(sample: Sample, region: SampleRegion) -> tuple:
    names = (region.category, region.core_category, region.caption, sample.file_name)
    return (region.id, region.rle.size, region.rle.counts, region.bbox, region.area, *names)
