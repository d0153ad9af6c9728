"""Audit, build and an independent look at small sources that are damaged by chance.

    python -m tests.cases.damaged 0 2000        # seeds; prints those that fail

A seed decides everything. For each: what `audit` calls usable the build keeps, or drops by a rule; nothing
ends in a traceback; every region of the files is in the ledger; every kept mask is that of the undamaged
source. See `layouts` and `damages` for what is made of it, and `counting` for the independent look.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq

from paracaption.pipeline.corpus import verify
from paracaption.pipeline.executor import audit
from paracaption.pipeline.io import photos
from paracaption.pipeline.sources.registry import open_source
from paracaption.schemas.config import BuildConfig
from paracaption.schemas.errors import ConfigError, ParaCaptionError
from paracaption.schemas.reasons import ERRORS
from paracaption.schemas.records import ImageRecord
from tests.backends import InstantCaptioner
from tests.building import build, config_of
from tests.cases import counting, damages
from tests.cases.layouts import make_source
from tests.cases.parts import read_parts, write_parts

_FOR_NOBODY = re.compile(r"0x[0-9a-f]{6,}|Traceback|\bobject at\b|\b[A-Z][A-Za-z]*Error:|Expected `|\$\.|\n")
"""What no message to a user has: addresses, names of exceptions, the words of a library about its types."""

_LONGEST_MESSAGE = 1_000

_WITHOUT_PHOTO = ("usable_masks", "whole_objects")
"""Stages that decide from masks alone, before the photo's pixels are read."""

Reading = dict[str, tuple[int, int, str]]
"""By key: regions, usable regions, and the reason of the image's drop."""


class Looking(InstantCaptioner):
    """Decodes each photo before it answers, as every real captioner does."""

    def caption(self, images: list[ImageRecord]) -> list[list[str | None]]:
        for image in images:
            photos.read_pixels(image)
        return super().caption(images)


class Run:
    """One seed.

    Args:
        seed: decides all.
        root: an empty folder.
    """

    def __init__(self, seed: int, root: Path):
        self.random = Random(seed)
        self.story: list[str] = []
        self.problems: list[str] = []
        self.root = root

    def run(self) -> str:
        """What does not hold; "" if everything does."""
        try:
            self.made = make_source(self.random, self.root / "source")
            self.truth = counting.true_masks(self.made)
            self.story.append(self.made.layout)
            self._damage()
            self._look()
        except Exception:  # noqa: BLE001 - also what should never have come through
            self.problems.append(traceback.format_exc())
        return "\n  ".join([f"{'; '.join(self.story)}", *self.problems]) if self.problems else ""

    # Damages.

    def _damage(self) -> None:
        before = read_parts(self.made.root)
        parts = dict(before)
        witnessed = self.made.has_areas and self.made.layout.startswith("pan") and self.random.random() < 0.4
        choices: dict[str, damages.Damage] = {**damages.PHOTOS, **damages.LABELS}
        choices |= damages.WITNESSED if witnessed else {**damages.NAMES, **damages.TEXTS, **damages.TEXTS}
        for _ in range(self.random.choice((0, 1, 1, 1, 2, 3))):
            name = self.random.choice(list(choices))
            if self._is_shape(parts) and name in ("JSON flipped", "JSON inserted", "JSON zeroed"):
                continue
            said = choices[name](self.random, self.made, parts)
            if said is not None:
                self.story.append(f"{name}: {said}")
        if parts != before:
            try:
                write_parts(self.made.root, parts)
            except ValueError:  # no Parquet file can hold this
                self.story.append("not written")
                write_parts(self.made.root, before)
        if self.random.random() < 0.4 and not witnessed and not self._is_shape(parts):
            self._damage_containers()

    def _is_shape(self, parts: dict[str, bytes]) -> bool:
        """Whether masks are polygons, where any number is a valid one."""
        return any(b'"segmentation": [' in data for data in parts.values())

    def _damage_containers(self) -> None:
        for path in self.made.files(".tar", ".parquet")[-1:]:
            choices = damages.TARS if path.suffix == ".tar" else damages.PARQUETS
            name = self.random.choice(list(choices))
            path.write_bytes(choices[name](self.random, path.read_bytes()))
            self.story.append(f"{name}: {path.name}")

    # What holds.

    def _look(self) -> None:
        out = self.root / "out"
        config = config_of(
            out,
            subsets={"s": {"sources": [self.made.entry]}},
            images_per_shard=self.random.randint(1, 4),
            audit_images=0,
        )
        looking = config.captioner.model_copy(update={"name": "tests.cases.damaged:Looking"})
        config = config.model_copy(update={"captioner": looking})
        try:
            reading = self._audit(config)
        except ParaCaptionError as error:
            self._check_words(str(error))
            self._check_refused(config, error)
            return
        build(config)
        found = (
            pq.read_table(sorted((out / "s" / "ledger").glob("s-*.parquet"))).to_pylist() if reading else []
        )
        self._check_ledger(reading, found)
        self._check_count(reading, found)
        for row in found:
            self._check_words(row["drop_detail"] or "")
            if row["kept"]:
                self._check_mask(row)
        self.problems += [f"verify: {problem}" for problem in verify.verify(out).problems if found][:3]

    def _check_refused(self, config: BuildConfig, error: ParaCaptionError) -> None:
        try:
            build(config)
        except ParaCaptionError as again:
            if str(again) != str(error):
                self.problems.append(f"audit says {error}, build says {again}")
            return
        self.problems.append(f"audit says {error}, build says nothing")

    def _audit(self, config: BuildConfig) -> Reading:
        source = open_source(config, "s")
        found: Reading = {}
        for entry in list(source.catalog()):
            result = audit.audit_images(source, [entry], config.limits)
            drops = (each for each in result.problems if each.drops and each.region is None)
            whole = next((each.reason for each in drops if each.regions or not result.regions), "")
            assert entry.key not in found, f"two images have the key {entry.key}"
            found[entry.key] = (result.regions, result.regions_usable, whole)
            for problem in result.problems:
                self._check_words(problem.detail)
        for note in source.notes:
            self._check_words(note.detail)
        if not found:
            raise ConfigError("nothing to build")
        return found

    def _check_ledger(self, reading: Reading, rows: list[dict[str, Any]]) -> None:
        """The ledger has what the audit has seen, and what was usable is not dropped by an error.

        A mask that is dropped for itself is so before anybody looks inside the photo; so of a photo that
        turns out to be none, the audit counts the region, and the ledger has the mask's own reason.
        """
        regions = Counter(row["key"] for row in rows if row["region"] is not None)
        unusable, unseen = Counter[str](), Counter[str]()
        for row in rows:
            if row["region"] is None:
                continue
            unusable[row["key"]] += row["drop_stage"] == "source" or row["drop_reason"] in ERRORS
            unseen[row["key"]] += row["drop_stage"] in _WITHOUT_PHOTO and row["drop_reason"] not in ERRORS
        if {row["key"] for row in rows} != reading.keys():
            self.problems.append(f"keys of audit and ledger differ: {sorted(reading)}")
        for key, (declared, usable, reason) in reading.items():
            found = (regions[key], regions[key] - unusable[key] - (unseen[key] if reason else 0))
            if found != (declared, usable):
                self.problems.append(f"{key}: audit has {usable} of {declared} usable, ledger {found[::-1]}")
            reasons = {row["drop_reason"] for row in rows if row["key"] == key}
            if reason and reason not in reasons and unseen[key] < regions[key]:
                self.problems.append(f"{key}: audit drops it as {reason}, the ledger as {reasons}")

    def _check_count(self, reading: Reading, rows: list[dict[str, Any]]) -> None:
        """Every region of the files has its row."""
        expected = counting.count_source(self.made)
        if expected is None:
            return
        counted = sum(row["region"] is not None for row in rows)
        if counted != expected.regions:
            self.problems.append(f"{expected.regions} regions in the files, {counted} in the ledger")
        if len(reading) < expected.images:
            self.problems.append(f"{expected.images} records in the files, {len(reading)} images built")

    def _check_mask(self, row: dict[str, Any]) -> None:
        """A kept mask is the one that its photo and id have in the undamaged source."""
        where = f"{row['key']}, region {row['region']}, id {row['source_id']}, {row['file_name']}"
        picture = counting.picture_of(self.made, row["file_name"])
        if not any("photos swapped" in said or "copied" in said for said in self.story):
            digests = {hashlib.sha256(each.photo).hexdigest(): each for each in self.made.pictures}
            seen = digests.get(str(row.get("photo_digest")))
            if seen is not None and seen is not picture:
                self.problems.append(f"{where}: kept with the photo of {seen.name}")
        if picture is None:
            self.problems.append(f"{where}: kept, and no such photo was there")
            return
        kept = counting.decode_counts(row["rle_counts"], row["image_height"], row["image_width"])
        true = self.truth.masks.get((picture.name, row["source_id"]))
        if true is None or (self.made.layout.startswith("sa1b") and self._has_changed_ids()):
            places = [mask for (name, _), mask in self.truth.by_place.items() if name == picture.name]
            right = any(mask.shape == kept.shape and (mask == kept).all() for mask in places)
        else:
            right = true.shape == kept.shape and bool((true == kept).all())
        if not right:
            self.problems.append(f"{where}: kept with another mask than the undamaged source has for it")

    def _has_changed_ids(self) -> bool:
        return any("JSON" in said or "field" in said or "tar flipped" in said for said in self.story)

    def _check_words(self, message: str) -> None:
        if found := _FOR_NOBODY.search(message):
            self.problems.append(f"words for nobody ({found.group()!r}): {message[:300]}")
        if len(message) > _LONGEST_MESSAGE:
            self.problems.append(f"a message of {len(message)} characters: {message[:300]}")


def problem_of_seed(seed: int) -> str:
    """What does not hold for a seed; "" if everything does."""
    with tempfile.TemporaryDirectory() as folder:
        found = Run(seed, Path(folder)).run()
        return f"seed {seed}: {found.replace(folder, '')}" if found else ""


def main() -> None:
    """Run the seeds from A to B."""
    logging.disable(logging.WARNING)
    seeds, began, bad = range(*map(int, sys.argv[1:3])), time.monotonic(), 0
    for seed in seeds:
        if found := problem_of_seed(seed):
            bad += 1
            sys.stdout.write(f"{found}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(seeds):,} runs, {bad} bad, {time.monotonic() - began:.0f} s\n")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
