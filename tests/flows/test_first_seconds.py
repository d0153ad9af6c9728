"""A mistake is one line that says what to do, before anything heavy is imported or started."""

import json
import subprocess
import sys

import pytest

from paracaption.pipeline.executor import findings
from paracaption.pipeline.executor.findings import FAIL, OK, Finding
from paracaption.pipeline.io import packages
from paracaption.schemas.errors import ConfigError

SCRIPT = """
import json, os, shutil, sys
from pathlib import Path
import yaml
from typer.testing import CliRunner
from benchmarks.startup import ROOT, cases
from paracaption.flows.cli.app import app

root, rows = Path(sys.argv[1]), []
for number, case in enumerate(cases(root)):
    home = shutil.copytree(ROOT / "samples", root / f"{number:02}")
    (home / "empty-checkpoint").mkdir()
    (home / "empty-checkpoint" / "config.json").write_text("{}")
    (home / "config.yaml").write_text(yaml.safe_dump(case.config))
    os.chdir(home)
    error = CliRunner().invoke(app, [case.command, "config.yaml"]).exception
    rows.append([case.command, case.name, type(error).__name__, str(error)])
heavy = {"torch", "transformers", "vllm", "ray", "prefect", "matplotlib", "cv2"} & set(sys.modules)
print(json.dumps({"rows": rows, "heavy": sorted(heavy)}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each provoked mistake was answered with, and what had been imported after all of them."""
    folder = tmp_path_factory.mktemp("mistakes")
    done = subprocess.run([sys.executable, "-c", SCRIPT, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.soak
def test_every_mistake_is_an_error_of_ours(found):
    assert len(found["rows"]) >= 20
    assert {kind for _, _, kind, _ in found["rows"]} == {"ConfigError"}


def test_each_mistake_is_one_line_that_says_what_to_do(found):
    for command, mistake, _, text in found["rows"]:
        if mistake == "the wrong photos folder":  # the report of the sample that was read
            continue
        for line in text.splitlines():  # an evaluation's configuration may hold two mistakes
            assert "; " in line and "Traceback" not in line, (command, mistake, line)
        assert len(text.splitlines()) <= (2 if command == "evaluate" else 1), (command, mistake, text)


def test_no_mistake_needs_a_heavy_import_to_be_found(found):
    assert found["heavy"] in ([], ["cv2"])  # the audit of a sample reads photos


def test_a_refusal_names_every_failure_and_no_success():
    seen = [
        Finding("a", OK, "is there"),
        Finding("b", FAIL, "is gone", "put it back"),
        Finding("c", FAIL, "x", "y"),
    ]
    with pytest.raises(ConfigError, match=r"^b: is gone; put it back\nc: x; y$"):
        findings.refuse_failures(seen)
    findings.refuse_failures(seen[:1])


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            "torch",
            "`make models` in a clone, or install paracaption again with the extra `models` (README.md)",
        ),
        (
            "segment_anything",
            "`make models` in a clone, or install paracaption again with the extra `models` (README.md)",
        ),
        (
            "peft",
            "`make models` in a clone, or install paracaption again with the extra `models` (README.md)",
        ),
        ("s3fs", "install paracaption again with the extra `remote` (docs/sources.md)"),
    ],
)
def test_a_missing_module_is_named_with_its_extra(module, words):
    assert packages.how_to_install(module) == words
