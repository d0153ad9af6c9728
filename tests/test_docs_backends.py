"""The examples of `docs/backends.md` are files that work: each is written as the page has it, and built."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from paracaption import open_corpus
from paracaption.filters import rle
from paracaption.flows.cli.app import app
from paracaption.pipeline.corpus import verify
from paracaption.pipeline.models import answers
from paracaption.pipeline.models.protocols import Question
from paracaption.pipeline.sources import registry
from paracaption.schemas.errors import BadRecord
from paracaption.schemas.records import Blob, ImageRecord, Region

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "backends.md").read_text()
FILES = dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))
MODULES = [name.removesuffix(".py") for name in FILES if name.endswith(".py")]
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
SAMPLE = ROOT / "samples" / "coconut" / "photos"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The page's files next to one another, and the sample."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    monkeypatch.chdir(tmp_path)
    if find_spec("paracaption.pipeline.io.own_modules") is None:  # which finds them next to the configuration
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setitem(registry.SOURCES, "my_source:Polygons", "my_source:Polygons")
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


def run(command: str) -> str:
    program, *arguments = shlex.split(command)
    assert program == "paracaption"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
    return result.output


def load(name: str) -> dict:
    """The names that a Python file of the page defines."""
    names: dict = {}
    exec(compile(FILES[name], name, "exec"), names)
    return names


def regions(out: Path, subset: str) -> list[dict]:
    columns = ["key", "region", "kept", "caption", "core_category", "drop_reason", "iou"]
    return [row for table in open_corpus(out).ledgers(subset, columns) for row in table.to_pylist()]


def test_the_page_has_an_example_of_each_kind_and_no_two_files_of_one_name():
    assert [name for name in FILES if name.endswith(".py")] == [
        "my_captioner.py",
        "my_judge.py",
        "my_segmenter.py",
        "my_generator.py",
        "my_source.py",
    ]
    assert len(re.findall(r"```(?:python|yaml)\n# \S+\n", PAGE)) == len(FILES)
    assert all(len(FILES[f"{name}.py"].splitlines()) <= 60 for name in MODULES)


@pytest.mark.soak
def test_the_three_backends_build_a_corpus_with_the_commands_of_the_page(folder):
    for command in (each for each in COMMANDS if "polygons" not in each):
        run(command)
    rows = regions(folder / "out" / "mine", "photos")
    assert verify.verify(folder / "out" / "mine").ok
    asked = [row for row in rows if row["caption"]]
    assert asked and all(row["core_category"] == "shape" for row in asked)
    assert {"bright", "dark"} == {row["caption"].split()[1] for row in asked}
    assert [row["kept"] for row in asked] == [row["iou"] >= 0.5 for row in asked]


@pytest.mark.soak
def test_another_version_asks_again_and_an_option_outside_of_the_identity_does_not(folder):
    build = "paracaption build mine.yaml --local --limit-images 2"
    run(build)
    evidence = folder / "out" / "mine" / "photos" / "evidence"
    before = {path.name for path in evidence.iterdir()}
    config = (folder / "mine.yaml").read_text()
    (folder / "mine.yaml").write_text(config.replace("{dark: 100}", "{dark: 100, max_pixels: 100000000}"))
    run(build)
    assert {path.name for path in evidence.iterdir()} == before
    code = (folder / "my_captioner.py").read_text()
    (folder / "my_captioner.py").write_text(code.replace('"version": "1"', '"version": "2"'))
    sys.modules.pop("my_captioner")
    importlib.invalidate_caches()
    sys.dont_write_bytecode, kept = True, sys.dont_write_bytecode
    try:
        run(build)
    finally:
        sys.dont_write_bytecode = kept
    added = {path.name.partition("-")[0] for path in evidence.iterdir() if path.name not in before}
    assert added == {"caption", "extract_category", "agree_with_segmenter"}


def test_the_judge_answers_both_kinds_of_questions(folder):
    judge = load("my_judge.py")["SubjectJudge"]()
    caption = "A dark tea cup that is 5 pixels wide."
    asked = [Question("verify", caption, "cup"), Question("verify", caption, "dog")]
    asked.append(Question("extract", caption))
    assert [answer.text for answer in judge.ask(asked)] == ["yes", "no", "tea cup"]
    assert judge.ask([]) == []


def test_a_photo_that_cannot_be_read_costs_its_own_regions_alone(folder):
    (folder / "broken.jpg").write_bytes(b"no photo")
    captioner = load("my_captioner.py")["BrightnessCaptioner"]()
    mask = rle.from_mask(np.ones((400, 600), bool))
    good = ImageRecord("good", "s", Blob(str(SAMPLE / "coffee.jpg")), 600, 400)
    bad = ImageRecord("bad", "s", Blob("broken.jpg"), 600, 400)
    for image in (good, bad):
        image.regions = [Region(number, mask.rle, mask.bbox, mask.area) for number in range(2)]
    captions = captioner.caption([bad, good])
    assert [isinstance(each, BadRecord) for each in captions[0]] == [True, True]
    assert [each.startswith("A ") for each in captions[1]] == [True, True]


def test_the_mask_generator_divides_a_photo_into_quarters(folder):
    generator = load("my_generator.py")["Quarters"]()
    found = answers.generated(generator.generate(np.zeros((9, 10, 3), np.uint8)), (9, 10))
    assert sorted(mask.area for mask, _ in found) == [20, 20, 25, 25]
    assert generator.generate(np.zeros((4, 10, 3), np.uint8)) == []


@pytest.mark.soak
def test_the_source_of_the_page_reads_polygons_and_keeps_count_of_what_is_wrong(folder):
    (example,) = re.findall(r'`(\{"photo": .*?\]\}\]\})`', PAGE, re.DOTALL)
    square = [100, 100, 200, 100, 200, 200, 100, 200]
    rows = [
        {"photo": "coffee.jpg", "regions": [{"category": "cup", "polygon": square}] * 2},
        {"photo": "flower.jpg", "regions": [{"category": "flower", "polygon": [1, 2]}]},
        {"photo": "gone.jpg", "regions": json.loads(example)["regions"]},
        {"photo": "coffee.jpg", "regions": [{"category": "cup", "polygon": square}]},
    ]
    (folder / "regions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for command in (each for each in COMMANDS if "polygons" in each):
        run(command)
    found = regions(folder / "out" / "polygons", "mine")
    reasons = sorted(str(row["drop_reason"]) for row in found)
    assert reasons == ["None", "duplicate_key", "mask_duplicate", "mask_undecodable", "photo_missing"]
    assert [row["caption"].split()[2] for row in found if row["kept"]] == ["cup"]
    assert verify.verify(folder / "out" / "polygons").ok
