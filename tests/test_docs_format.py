"""docs/format.md: its tables name every column and field of the code and no other, and its examples run."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import msgspec
import pyarrow as pa
import pytest
import yaml

from paracaption.pipeline.corpus import (
    events,
    export,
    growth,
    ledger,
    merge,
    records,
    work_list_summary,
    work_list_table,
)
from paracaption.pipeline.executor import audit, in_flight
from paracaption.pipeline.stages.base import ModelStage
from paracaption.pipeline.stages.recipes import RECIPES
from paracaption.pipeline.stages.registry import STAGES
from paracaption.schemas import manifest, sample, summary
from tests import building
from tests.synthetic import write_coconut, write_sa1b

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "format.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="no clone, but an installed wheel")

FIELDS: dict[str, type] = {
    "Fields of the JSON": sample.Sample,
    "Fields of a region": sample.SampleRegion,
    "Fields of a manifest": manifest.Manifest,
    "Fields of `shard` and `ledger`": manifest.FileEntry,
    "Fields of `stats.json`": summary.CorpusSummary,
    "Fields of a subset's statistics": summary.SubsetSummary,
    "Fields of `counts`": summary.SubsetCounts,
    "Fields of a step of the funnel": summary.FunnelStep,
    "Fields of a histogram": summary.Histogram,
    "Fields of a license": summary.LicenseCount,
    "Fields of `plan.json`": work_list_summary.WorkList,
    "Fields of a step of the work list": growth.Step,
    "Fields of a line": records._Line,
    "Fields of a committed unit": records.LogUnit,
    "Fields of a file in the log": records.LogFile,
    "Fields of an event": events.Event,
    "Fields of a note in `journal/`": in_flight.Note,
}
"""A heading of the page, and the struct whose fields its table has."""


@cache
def tables() -> dict[str, list[list[str]]]:
    """The rows of each table below a heading of the third level, without their backquotes."""
    found = {}
    for section in PAGE.read_text().split("\n### ")[1:]:
        heading, _, rest = section.partition("\n")
        lines = rest.strip().partition("\n\n")[0].splitlines()[2:]
        found[heading] = [[plain(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
    return found


def plain(cell: str) -> str:
    """A cell without its backquotes, if all of it is one piece of code."""
    return cell[1:-1] if re.fullmatch(r"`[^`]*`", cell) else cell


def names(heading: str) -> list[str]:
    return [row[0] for row in tables()[heading]]


@pytest.mark.parametrize("heading", list(FIELDS))
def test_each_table_of_fields_has_those_of_its_struct_in_order(heading):
    assert names(heading) == list(FIELDS[heading].__struct_fields__)


def columns(schema: pa.Schema) -> list[tuple[str, str]]:
    """(name, type) of each column; a list's type is written without the name of its elements' field."""
    return [(field.name, str(field.type).replace("item:", "element:")) for field in schema]


def documented(*headings: str) -> list[tuple[str, str]]:
    return [(row[0], row[1]) for heading in headings for row in tables()[heading]]


def test_the_ledgers_columns_have_their_names_types_and_order():
    schema = ledger.ledger_schema()
    assert documented("Columns of a ledger") == columns(schema)
    never = {row[0] for row in tables()["Columns of a ledger"] if row[3] == "never"}
    assert never == {field.name for field in schema if not field.nullable}


def test_the_columns_that_may_be_missing_are_the_last_ones():
    found = names("Columns of a ledger")
    assert set(found[found.index("photo_digest") :]) == ledger._LATER


def test_the_index_has_the_ledgers_columns_but_those_that_the_page_names():
    text = " ".join(PAGE.read_text().split())
    without = re.search(r"It has the ledger's columns without (.*?)\. Two things differ", text)
    assert without is not None and set(re.findall(r"`(\w+)`", without[1])) == ledger.NOT_IN_INDEX
    added = set(columns(merge._index_form(False, 0.1)[0])) - set(columns(ledger.index_schema()))
    assert documented("Column that the index adds") == list(added)


def test_the_columns_of_evidence_are_those_that_each_stage_writes(tmp_path):
    common = documented("Columns of all evidence")
    added = {}
    for heading in tables():
        if heading.startswith("Columns that `"):
            added |= dict.fromkeys(re.findall(r"`(\w+)`", heading), documented(heading))
    asked = {name: stage for name, stage in STAGES.items() if issubclass(stage, ModelStage)}
    assert set(added) == set(asked)
    for name, stage in asked.items():
        schema = ModelStage.store.__globals__["EvidenceStore"](tmp_path, stage.evidence)._schema(set())
        assert common + added[name] == columns(schema), name


def test_the_columns_of_the_work_list_have_their_names_types_and_order():
    assert documented("Columns of `plan.parquet`") == columns(work_list_table._schema(credits=True))


def test_every_kind_of_record_is_listed_with_its_fields():
    common = records._Record.__struct_fields__
    assert names("Fields of all records") == ["kind", *common]
    kinds = {}
    for each in records.Record.__args__:
        kinds[each.__struct_config__.tag] = set(each.__struct_fields__) - set(common)
    listed = {row[0]: set(re.findall(r"\w+", row[2])) for row in tables()["Kinds of records"]}
    assert listed == kinds


def test_the_columns_of_an_audit_have_their_names_types_and_order(tmp_path):
    import pyarrow.parquet as pq

    problem = audit.Problem("coconut", "a", 1, "crowd", True, 1, "a crowd")
    audit.AuditReport("coconut", audit.AuditResult(problems=[problem])).write(tmp_path / "audit.parquet")
    written = pq.read_schema(tmp_path / "audit.parquet")
    assert documented("Columns of `audit.parquet`") == columns(written)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a corpus of both kinds of sources, kept and dropped regions, and its export."""
    folder = tmp_path_factory.mktemp("format")
    config = building.config_of(
        folder / "corpus",
        coconut=write_coconut(folder / "coconut", 6),
        sa1b=write_sa1b(folder / "sa1b", 3),
        masks={"min_area_px": 1200},
    )
    building.build(config)
    counts = merge.merge(folder / "corpus", config)
    assert 0 < counts["kept"] < counts["regions"]
    export.export(folder / "corpus", "coco", folder / "exported")
    return folder


@pytest.mark.soak
def test_the_ledgers_columns_are_null_when_the_page_says(folder):
    """For the conditions that a row itself shows: kept, dropped, and the stages that a kept region passed."""
    import pyarrow.parquet as pq

    for subset, recipe in (("coconut", RECIPES["verify"]), ("sa1b", RECIPES["identify"])):
        for path in (folder / "corpus" / subset / "ledger").glob("*.parquet"):
            for row in pq.read_table(path).to_pylist():
                for column, _, _, when in tables()["Columns of a ledger"]:
                    if when in ("kept", "dropped"):
                        assert (row[column] is None) == (row["kept"] == (when == "kept")), (column, row)
                    elif (stage := re.match(r"the region did not reach `(\w+)`", when)) and row["kept"]:
                        assert (row[column] is None) == (stage[1] not in recipe), (column, row)
                    elif when.startswith(("never", "in practice never", "the mask could not be read")):
                        assert row[column] is not None, (column, row)


def test_the_cards_front_matter_has_the_keys_of_the_page(folder):
    front = (folder / "corpus" / "README.md").read_text().split("---\n")[1]
    assert names("Keys of the card's front matter") == list(yaml.safe_load(front))


def pattern(place: str) -> str:
    """A regular expression of a place such as `<subset>/shards/<unit>.tar`, or of all that is in a folder."""
    pieces = re.split(r"(<\w+>|\*)", place)
    found = "".join("[^/]+" if re.fullmatch(r"<\w+>|\*", each) else re.escape(each) for each in pieces)
    return f"{found}.+" if place.endswith("/") else found


def test_every_file_of_a_corpus_is_in_the_list_of_files(folder):
    listed = PAGE.read_text().partition("```\nOUT/\n")[2].partition("```")[0]
    places = [place for line in listed.splitlines() for place in line.strip().partition("   ")[0].split()]
    for path in (folder / "corpus").rglob("*"):
        name = path.relative_to(folder / "corpus").as_posix()
        assert path.is_dir() or any(re.fullmatch(pattern(each), name) for each in places), name


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if PAGE.exists() else []


@pytest.mark.parametrize("code", examples(), ids=lambda code: code.splitlines()[-1].strip()[:30])
def test_each_example_of_the_page_runs(folder, monkeypatch, code):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    exec(compile(code, "docs/format.md", "exec"), {})


def test_an_example_of_each_library_is_on_the_page():
    code = "\n".join(examples())
    for library in ("webdataset", "datasets", "pyarrow.parquet", "duckdb", "pycocotools.coco"):
        assert re.search(rf"^(?:import|from) {re.escape(library)}\b", code, re.MULTILINE), library


def test_corpus_json_is_what_the_page_says(folder):
    written = msgspec.json.decode((folder / "corpus" / "corpus.json").read_bytes())
    quoted = re.search(r"`corpus.json` is `(.*?)`", PAGE.read_text())
    assert quoted is not None and msgspec.json.decode(quoted[1]) == written
