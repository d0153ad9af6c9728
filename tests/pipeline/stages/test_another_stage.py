"""A stage is its own file; its lines in the registry and in a recipe; its reason, score and threshold."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import paracaption
from tests.synthetic import write_coconut

STAGE = '''
from ...filters.verdict import Verdict
from ...schemas.reasons import Reason
from .base import FilterStage, Threshold


class FewCommas(FilterStage):
    """Drops captions with too many commas."""

    name, title = "few_commas", "commas, few"
    reasons, scores = (Reason.TEXT_COMMAS,), ("num_commas",)
    thresholds = (Threshold("max_commas", "num_commas", False, Reason.TEXT_COMMAS, (0, 9, 1), "most commas"),)

    @property
    def settings(self):
        return self.config.max_commas

    def decide(self, image):
        verdicts = []
        for region in image.live():
            commas = (region.caption or "").count(",")
            reason = Reason.TEXT_COMMAS if commas > self.config.max_commas else None
            verdicts.append(Verdict(reason, f"{commas} commas", {"num_commas": commas}))
        return verdicts
'''

LINES = {
    "pipeline/stages/registry.py": [
        ("from .masks import", "from .few_commas import FewCommas\nfrom .masks import"),
        ("        CleanText,\n", "        FewCommas,\n        CleanText,\n"),
    ],
    "pipeline/stages/recipes.py": [
        ('"verify_category", "clean_text"', '"verify_category", "few_commas", "clean_text"')
    ],
    "schemas/reasons.py": [("    TEXT_JUNK =", '    TEXT_COMMAS = "text_commas"\n    TEXT_JUNK =')],
    "schemas/records.py": [
        ('    "repeat_share":', '    "num_commas": "commas in the caption",\n    "repeat_share":')
    ],
    "schemas/config.py": [("    text: Text = Text()", "    max_commas: int = 0\n    text: Text = Text()")],
}
"""File -> (text that is there, text in its place): all that a stage needs beside its own file."""

SCRIPT = """
import json, sys
from matplotlib.axes import Axes
from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.corpus import reader
from paracaption.pipeline.executor import driver
from paracaption.pipeline.executor.local import LocalEngine
from paracaption.pipeline.explorer import whatif
from paracaption.pipeline.explorer.catalog import Catalog

drawn = []
plain = Axes.set_yticks


def set_yticks(axes, ticks, labels=None, **given):
    drawn.extend(labels or ())
    plain(axes, ticks, labels, **given)


Axes.set_yticks = set_yticks
config = load_config(sys.argv[1])
driver.build(config, LocalEngine())
corpus = reader.open_corpus(config.out)
wanted = whatif.change_config(config, {"max_commas": 2})
change, _ = whatif.compare(Catalog(config.out), "coconut", config, wanted)
ledgers = [reader.read_ledger(unit.ledger) for unit in corpus.units()]
found = {
    "funnel": [(step.stage, step.dropped) for step in corpus.summary.subsets["coconut"].counts.funnel],
    "card": open(f"{config.out}/README.md").read(),
    "drawn": drawn,
    "scores": [score for ledger in ledgers for score in ledger["num_commas"].to_pylist()],
    "lines": whatif.changed_lines(config, wanted),
    "change": (change.kept, change.gained, change.then),
}
driver.build(wanted, LocalEngine())
found["rebuilt"] = corpus.summary.kept
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What a copy of the package with one more stage makes of a corpus."""
    home = tmp_path_factory.mktemp("another-stage")
    package = home / "paracaption"
    unused = shutil.ignore_patterns("__pycache__", "samples", "model_training", "flows")
    shutil.copytree(Path(paracaption.__file__).parent, package, ignore=unused)
    (package / "pipeline/stages/few_commas.py").write_text(STAGE)
    for name, changes in LINES.items():
        text = (package / name).read_text()
        for old, new in changes:
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, new)
        (package / name).write_text(text)
    source = {"source": "coconut", **write_coconut(home / "source", num_images=4)}
    values = {"out": str(home / "out"), "images_per_shard": 2, "subsets": {"coconut": {"sources": [source]}}}
    (home / "build.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-c", SCRIPT, str(home / "build.yaml")]
    environment = os.environ | {"PYTHONPATH": str(home)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.soak
def test_it_drops_in_its_place_in_the_funnel(found):
    names = [name for name, _ in found["funnel"]]
    assert names == ["source", "usable_masks", "caption", "verify_category", "few_commas", "clean_text"]
    assert dict(found["funnel"])["few_commas"] > 0


def test_its_score_is_a_column_of_the_ledger(found):
    assert len(set(found["scores"])) > 1


def test_the_card_and_the_plots_show_it(found):
    assert "| few_commas |" in found["card"] and "text_commas" in found["card"]
    assert "- `num_commas`: commas in the caption" in found["card"]
    assert "commas, few" in found["drawn"]


def test_another_threshold_keeps_what_the_explorer_says(found):
    kept, gained, then = found["change"]
    assert found["lines"] == "max_commas: 2"
    assert 0 < gained and kept + gained == then == found["rebuilt"]
