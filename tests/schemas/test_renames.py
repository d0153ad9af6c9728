"""Old names work until the version that the table names, and a warning says the new one."""

import importlib.metadata
import subprocess
import sys
import warnings

import pytest
from packaging.version import Version

from paracaption.pipeline.sources.sa1b import Sa1bOptions
from paracaption.schemas import renames
from paracaption.schemas.renames import Renamed


def test_an_old_key_is_translated_with_a_warning_that_says_the_new_one():
    with pytest.warns(renames.RenamedWarning, match="`licence` is now `license`"):
        source = Sa1bOptions.model_validate({"paths": ["a.tar"], "licence": "CC0"})
    assert source.license == "CC0"


def test_a_name_that_stays_elsewhere_is_said_with_its_place():
    with pytest.warns(renames.RenamedWarning, match="in `corpora`, `out` is now `corpus`"):
        assert renames.translate("CorpusSource", {"out": "a"}) == {"corpus": "a"}


def test_both_names_at_once_are_an_error():
    with pytest.raises(ValueError, match="both given; keep `license`"):
        Sa1bOptions.model_validate({"paths": [], "licence": "a", "license": "b"})


TABLE = (
    Renamed("command", "plan", "estimate"),
    Renamed("option", "plan --corpus", "estimate --sources"),
    Renamed("option", "benchmark make --to", "--folder"),
)


@pytest.mark.parametrize(
    ("given", "meant", "said"),
    [
        ("plan a.yaml --gpus 4", "estimate a.yaml --gpus 4", ["`plan` is now `estimate`"]),
        (
            "plan a.yaml --corpus",
            "estimate a.yaml --sources",
            ["`plan` is now", "`plan --corpus` is now `estimate --sources`"],
        ),
        ("benchmark make out --to=x", "benchmark make out --folder=x", ["`benchmark make --to` is now"]),
        ("build plan --corpus --to", "build plan --corpus --to", []),
    ],
)
def test_old_commands_and_options_are_translated_with_a_warning_each(monkeypatch, given, meant, said):
    monkeypatch.setattr(renames, "RENAMED", TABLE)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert renames.translate_command_line(given.split()) == meant.split()
    assert [text in str(each.message) for text, each in zip(said, shown, strict=True)] == [True] * len(said)


def test_the_command_line_says_an_old_name_in_one_line_and_goes_on(tmp_path):
    config = tmp_path / "build.yaml"
    config.write_text("out: out\nsa1b: [{paths: [a.tar], licence: A}, {paths: [b.tar], licence: B}]\n")
    command = [sys.executable, "-m", "paracaption.flows.cli", "audit", str(config)]
    done = subprocess.run(command, capture_output=True, text=True)
    warning, error = done.stderr.splitlines()
    assert warning == "warning: `licence` is now `license`; paracaption 0.4 will not know the old name"
    assert error.startswith("error: subsets.sa1b.sources.0.paths: nothing found")


@pytest.mark.parametrize("each", renames.RENAMED, ids=lambda each: f"{each.where}.{each.old}")
def test_an_old_name_goes_in_its_version(each):
    assert Version(importlib.metadata.version("paracaption")) < Version(each.until), (
        f"remove {each.old} from schemas/renames.py: this version does not know it any more"
    )
