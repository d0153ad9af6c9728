"""What the models answered about an image's regions, from the evidence that is kept next to the corpus.

Evidence of another model or of another question may lie next to that which decided. What is shown agrees with
the scores in the ledger, and is the newest that does. In a bucket, the evidence of a unit may have parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from ...schemas.errors import IntegrityError
from ...schemas.records import Rle
from ..io import files
from ..io.location import Location, is_bucket
from ..io.store import store_of
from ..io.tables import TableFile
from ..stages.agreement import Resegmented
from ..stages.base import ModelStage
from ..stages.caption import Captioned
from ..stages.category import Judged
from ..stages.registry import STAGES


class RegionEvidence(NamedTuple):
    """What the models said about one region.

    Attributes:
        captions: by the id of each stage that asked a captioner, if there are several; None of one that said
            nothing.
        answers: by the id of each stage that asked a judge: "yes", "no", or the category in its words.
        num_candidates: how many masks the segmenter found; None if it was not asked.
        mask: the one that overlaps the region most; None if there is none.
    """

    captions: dict[str, str | None] = {}
    answers: dict[str, str] = {}
    num_candidates: int | None = None
    mask: Rle | None = None


def read_evidence(
    out: Location, subset: str, rows: list[dict[str, Any]], kinds: Mapping[str, str] | None = None
) -> dict[int, RegionEvidence]:
    """The evidence of some regions of one image, by region.

    Args:
        out: the corpus.
        subset: of the image.
        rows: of the ledger, all of one image.
        kinds: the kind of each stage of the subset's recipe by its id, in order; of stages that are not ours
            nothing is shown. None is every stage of ours under its own name.
    """
    kinds = kinds or {name: name for name in STAGES}
    by_region = {row["region"]: row for row in rows if row["region"] is not None}
    found: dict[int, RegionEvidence] = {region: RegionEvidence() for region in by_region}
    if not by_region:
        return found
    size = (rows[0]["image_height"], rows[0]["image_width"])
    stages = {name: stage for name, kind in kinds.items() if (stage := _shown(kind, kinds)) is not None}
    for name, stage in stages.items():
        done: set[int] = set()
        is_alone = list(kinds.values()).count(kinds[name]) == 1  # else the ledger has the last one's scores
        for path in _newest_first(out / subset / "evidence", name, rows[0]["unit"]):
            for region, answer in _read_answers(path, rows[0]["key"], stage.evidence):
                row = by_region.get(region)
                if row is None or region in done or (is_alone and not stage.matches(answer, row)):
                    continue
                done.add(region)
                found[region] = _with_answer(found[region], name, answer, size)
    return found


def _shown(kind: str, kinds: Mapping[str, str]) -> type[ModelStage] | None:
    """The class of a stage whose answers are shown: a caption is, where it need not be that of the ledger."""
    stage = STAGES.get(kind)
    if stage is None or not issubclass(stage, ModelStage):
        return None
    if stage.evidence is Captioned:
        return stage if list(kinds.values()).count(kind) > 1 else None
    return stage if stage.evidence in (Judged, Resegmented) else None


def _with_answer(found: RegionEvidence, name: str, answer: Any, size: tuple[int, int]) -> RegionEvidence:
    if isinstance(answer, Captioned):
        return found._replace(captions={**found.captions, name: answer.caption})
    if isinstance(answer, Judged):
        return found._replace(answers={**found.answers, name: answer.answer})
    return found._replace(num_candidates=answer.num_candidates, mask=answer.rle(size))


def _newest_first(folder: Location, stage: str, unit: str) -> list[Location]:
    """The files that may have evidence of a unit, those of the stage's newest folder first."""
    dated: list[tuple[float, list[Location]]] = []
    for name in files.list_names(str(folder)):
        if name.rpartition("-")[0] == stage:
            path = folder / name / f"{unit}.parquet"
            named = path if is_bucket(folder) else folder / name  # a folder of a bucket has no time
            with suppress(FileNotFoundError):  # nothing about this unit
                dated.append((store_of(folder).modified_s(str(named)), _parts(folder / name, unit)))
    return [path for _, found in sorted(dated, key=lambda each: -each[0]) for path in found]


def _parts(folder: Location, unit: str) -> list[Location]:
    """All parts of a unit's evidence; see `stages.evidence`."""
    found: list[Location] = [folder / f"{unit}.parquet"]
    while is_bucket(folder) and store_of(folder).size(f"{folder}/{unit}.{len(found)}.parquet") is not None:
        found.append(folder / f"{unit}.{len(found)}.parquet")
    return found


def _read_answers(path: Location, key: str, kind: type[msgspec.Struct]) -> list[tuple[int, Any]]:
    import pyarrow as pa

    try:
        file = TableFile(str(path))
        names = [name for name in kind.__struct_fields__ if name in file.names]  # the others are null in it
        table = file.find(["region", *names], key=key)
        rows = zip(*(table[name].to_pylist() for name in ("region", *names)), strict=True)
        return [(region, kind(**dict(zip(names, answer, strict=True)))) for region, *answer in rows]
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, IntegrityError):
        return []  # missing, damaged, or being written again: the page does without it
