"""The examples of `docs/recipes.md` are files that work: each is written as the page has it, and built."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from paracaption import open_corpus
from paracaption.pipeline.corpus import merge, verify
from paracaption.pipeline.io import own_modules
from paracaption.pipeline.stages import registry
from paracaption.pipeline.stages.composite import COMPOSITES
from paracaption.pipeline.stages.options import option_names
from paracaption.schemas.config import Masks, Text
from tests.test_docs_backends import run

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "recipes.md").read_text()
FILES = dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The page's files next to one another, and the sample."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_stages", None)


def test_the_recipe_of_the_page_builds_and_its_corpus_verifies(folder):
    run("paracaption build own_recipe.yaml --local")
    found = open_corpus("own")
    funnel = [step.stage for step in found.summary.subsets["photos"].counts.funnel]
    assert funnel == ["source", "usable_masks", "described", "agreed", "clean_text"]
    assert found.summary.kept
    report = verify.verify("own")
    assert report.ok and not report.notes, report.text()
    assert "nothing to do" in run("paracaption build own_recipe.yaml --local")


@pytest.mark.soak
def test_the_stage_of_the_page_drops_and_is_shown_without_being_imported(folder):
    run("paracaption build own_stage.yaml --local")
    details = [
        row["drop_detail"]
        for table in open_corpus("contrast").ledgers("photos", ["drop_stage", "drop_reason", "drop_detail"])
        for row in table.to_pylist()
        if (row["drop_stage"], row["drop_reason"]) == ("contrast", "own_rule")
    ]
    assert details and all(re.fullmatch(r"contrast [\d.]+, at least 40 needed", each) for each in details)
    assert "is a stage of its own, `my_stages:Contrast`" in (folder / "contrast" / "README.md").read_text()
    script = """
import sys
from pathlib import Path
from paracaption.pipeline.corpus import inspect, merge, reader, verify
from paracaption.pipeline.explorer.catalog import Catalog
from paracaption.pipeline.explorer import charts, whatif
corpus = reader.open_corpus("contrast")
print([step.stage for step in merge.count_subset(corpus, "photos").funnel])
assert verify.verify("contrast").ok
merge.merge("contrast")
config = corpus.config
assert "a stage of your own" in whatif.why_not(config, "photos")
charts.read_distributions(Catalog(Path("contrast")), "photos", config)
assert "my_stages" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "['source', 'usable_masks', 'contrast', 'caption'" in done.stdout


@pytest.mark.soak
@pytest.mark.ray
def test_the_stage_of_the_page_builds_the_same_under_ray(folder):
    run("paracaption build own_stage.yaml --local")
    local = merge.count_subset(open_corpus("contrast"), "photos")
    (folder / "contrast").rename(folder / "before")
    own_modules.look_in(folder)
    run("paracaption build own_stage.yaml")
    assert merge.count_subset(open_corpus("contrast"), "photos") == local


def test_the_table_of_stages_is_that_of_the_registry():
    rows = re.findall(r"^\| `(\w+)` \|[^|\n]*\|([^|\n]*)\|([^|\n]*)\|([^|\n]*)\|$", PAGE, re.MULTILINE)
    assert [name for name, *_ in rows] == list(registry.STAGES)
    sections = {"the keys of `masks`": Masks, "the keys of `text`": Text}
    for name, needs, gives, options in rows:
        stage = registry.STAGES[name]
        assert [each for each in needs.strip().split(", ") if each] == list(stage.needs)
        assert [each for each in gives.strip().split(", ") if each] == list(stage.gives)
        section = sections.get(options.strip())
        listed = list(section.model_fields) if section else re.findall(r"`(\w+)`", options)
        assert listed == option_names(stage)
    assert all(f"{{{name}: [...]" in PAGE for name in COMPOSITES)
