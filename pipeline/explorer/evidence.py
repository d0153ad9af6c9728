"""What the models said of an image's regions, from the evidence that is kept beside the corpus.

Evidence of another model or of another question may lie beside that which decided: what is shown agrees with
the scores in the ledger, and the newest of it is taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ...schemas.records import Rle
from ..stages.agreement import Resegmented
from ..stages.base import ModelStage
from ..stages.category import Judged
from ..stages.registry import STAGES


class Said(NamedTuple):
    """Of one region: the judge's answer, and the segmenter's best mask.

    Attributes:
        answer: "yes", "no", or the category as the judge worded it; None if it was not asked.
        num_candidates: masks that the segmenter found; None if it was not asked.
        mask: the one that overlaps most; None if there is none.
    """

    answer: str | None = None
    num_candidates: int | None = None
    mask: Rle | None = None


def of_image(out: Path, subset: str, rows: list[dict[str, Any]]) -> dict[int, Said]:
    """By region.

    Args:
        out: the corpus.
        subset: of it.
        rows: of the ledger, all of one image.
    """
    by_region = {row["region"]: row for row in rows if row["region"] is not None}
    found: dict[int, Said] = {region: Said() for region in by_region}
    if not by_region:
        return found
    size = (rows[0]["image_height"], rows[0]["image_width"])
    for stage in STAGES.values():
        if not issubclass(stage, ModelStage) or stage.evidence not in (Judged, Resegmented):
            continue
        seen: set[int] = set()
        for folder in _newest_first(out / subset / "evidence", stage.name):
            path = folder / f"{rows[0]['unit']}.parquet"
            for region, answer in _read(path, rows[0]["key"], stage.evidence):
                row = by_region.get(region)
                if row is None or region in seen or not stage.matches(answer, row):
                    continue
                seen.add(region)
                if isinstance(answer, Judged):
                    found[region] = found[region]._replace(answer=answer.answer)
                else:
                    mask = answer.rle(size)
                    found[region] = found[region]._replace(num_candidates=answer.num_candidates, mask=mask)
    return found


def _newest_first(folder: Path, stage: str) -> list[Path]:
    return sorted(folder.glob(f"{stage}-*"), key=lambda path: path.stat().st_mtime, reverse=True)


def _read(path: Path, key: str, kind: type[msgspec.Struct]) -> list[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = kind.__struct_fields__
    try:
        with open(path, "rb") as file:
            table = pq.read_table(
                file, columns=["region", *names], filters=[("key", "=", key)], use_threads=False
            )
    except (OSError, pa.ArrowException, KeyError):
        return []  # gone, or being written anew: the page does without
    rows = zip(*(table[name].to_pylist() for name in ("region", *names)), strict=True)
    return [(region, kind(*answer)) for region, *answer in rows]
