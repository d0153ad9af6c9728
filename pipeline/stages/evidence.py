"""What models said, kept per stage and unit, so that it is paid for once.

`evidence/<stage>-<digest>/<unit>.parquet` holds a row per region. The digest covers everything the answer
depends on (backend, weights, prompt, settings, and the stages before it that used a model), so evidence of
another model is never taken for this one's. Each row also carries a fingerprint of what exactly was asked
(the mask, the caption, the phrase): a row whose question has changed counts as missing.

Files appear whole (temporary name, then rename). Two workers may write the same unit; either result is right.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from ..io import files

log = logging.getLogger(__name__)

E = TypeVar("E", bound=msgspec.Struct)


_COLUMNS = {"str": "string", "int": "int64", "float": "float64"}

Evidence = dict[tuple[str, int], tuple[str, E]]
"""(image key, region id) -> (fingerprint of the question, answer)."""


class EvidenceStore(Generic[E]):
    """The evidence of one stage.

    Args:
        folder: OUT/<subset>/evidence/<stage>-<digest>.
        kind: the struct of one row.
    """

    def __init__(self, folder: Path, kind: type[E]):
        self.folder = folder
        self.kind = kind

    def path(self, unit: str) -> Path:
        """Where the unit's evidence lies."""
        return self.folder / f"{unit}.parquet"

    def load(self, unit: str) -> Evidence[E]:
        """All evidence of a unit, empty if there is none; an unreadable file is none, with a warning."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.path(unit)
        try:
            table = pq.ParquetFile(path).read()
            columns = [table.column(name).to_pylist() for name in self._names()]
        except FileNotFoundError:
            return {}
        except (OSError, pa.ArrowException, KeyError) as error:
            log.warning("%s: unreadable evidence (%s); it is asked for again", path, error)
            return {}
        return {
            (key, region): (asked, self.kind(*answer))
            for key, region, asked, *answer in zip(*columns, strict=True)
        }

    def save(self, unit: str, evidence: Evidence[E]) -> None:
        """Replace a unit's evidence, atomically; rows sorted by image key and region."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = sorted(evidence.items(), key=lambda item: item[0])
        columns: list[list] = [[key for (key, _), _ in rows], [region for (_, region), _ in rows]]
        columns.append([asked for _, (asked, _) in rows])
        answers = [answer for _, (_, answer) in rows]
        columns += [[getattr(answer, name) for answer in answers] for name in self.kind.__struct_fields__]
        table = pa.Table.from_arrays(
            [pa.array(column, field.type) for column, field in zip(columns, self._schema(), strict=True)],
            schema=self._schema(),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        with files.write_atomic(self.path(unit)) as file:
            pq.write_table(table, file, compression="zstd")

    def _names(self) -> list[str]:
        return ["key", "region", "asked", *self.kind.__struct_fields__]

    def _schema(self):
        import pyarrow as pa

        types = ["string", "int64", "string"] + [
            _COLUMNS[str(annotation).split(" |")[0].strip()]
            for annotation in self.kind.__annotations__.values()
        ]
        return pa.schema(
            [(name, pa.type_for_alias(kind)) for name, kind in zip(self._names(), types, strict=True)]
        )


def fingerprint(*parts: object) -> str:
    """16 hex digits of what was asked."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def digest(*parts: object) -> str:
    """16 hex digits that identify a configuration; JSON with sorted keys underneath."""
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()[:16]
