"""What the models answered about an image's regions, from the evidence that is kept next to the corpus.

Evidence of another model or of another question may lie next to that which decided. What is shown agrees with
the scores in the ledger, and is the newest that does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ...schemas.errors import IntegrityError
from ...schemas.records import Rle
from ..io import files
from ..io.store import store_of
from ..io.tables import TableFile
from ..stages.agreement import Resegmented
from ..stages.base import ModelStage
from ..stages.category import Judged
from ..stages.registry import STAGES


class RegionEvidence(NamedTuple):
    """The judge's answer about one region, and the segmenter's best mask.

    Attributes:
        answer: "yes", "no", or the category in the judge's words; None if it was not asked.
        num_candidates: how many masks the segmenter found; None if it was not asked.
        mask: the one that overlaps the region most; None if there is none.
    """

    answer: str | None = None
    num_candidates: int | None = None
    mask: Rle | None = None


def read_evidence(out: Path, subset: str, rows: list[dict[str, Any]]) -> dict[int, RegionEvidence]:
    """The evidence of some regions of one image, by region.

    Args:
        out: the corpus.
        subset: of the image.
        rows: of the ledger, all of one image.
    """
    by_region = {row["region"]: row for row in rows if row["region"] is not None}
    found: dict[int, RegionEvidence] = {region: RegionEvidence() for region in by_region}
    if not by_region:
        return found
    size = (rows[0]["image_height"], rows[0]["image_width"])
    for stage in STAGES.values():
        if not issubclass(stage, ModelStage) or stage.evidence not in (Judged, Resegmented):
            continue
        done: set[int] = set()
        for folder in _newest_first(out / subset / "evidence", stage.name):
            path = folder / f"{rows[0]['unit']}.parquet"
            for region, answer in _read_answers(path, rows[0]["key"], stage.evidence):
                row = by_region.get(region)
                if row is None or region in done or not stage.matches(answer, row):
                    continue
                done.add(region)
                if isinstance(answer, Judged):
                    found[region] = found[region]._replace(answer=answer.answer)
                else:
                    mask = answer.rle(size)
                    found[region] = found[region]._replace(num_candidates=answer.num_candidates, mask=mask)
    return found


def _newest_first(folder: Path, stage: str) -> list[Path]:
    names = [name for name in files.list_names(str(folder)) if name.startswith(f"{stage}-")]
    store = store_of(folder)
    return sorted(
        (folder / name for name in names), key=lambda path: store.modified_s(str(path)), reverse=True
    )


def _read_answers(path: Path, key: str, kind: type[msgspec.Struct]) -> list[tuple[int, Any]]:
    import pyarrow as pa

    names = kind.__struct_fields__
    try:
        table = TableFile(str(path)).find(["region", *names], key=key)
        rows = zip(*(table[name].to_pylist() for name in ("region", *names)), strict=True)
        return [(region, kind(*answer)) for region, *answer in rows]
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, IntegrityError):
        return []  # missing, damaged, or being written again: the page does without it
