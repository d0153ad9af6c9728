"""A trained model as a model repository: its files, and a card that says only what is known."""

from __future__ import annotations

import getpass
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from paracaption.flows.cli.app import app
from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.model_training.evaluation import held_out
from paracaption.model_training.train import publish
from paracaption.model_training.train.trainer import fit
from paracaption.schemas.errors import ConfigError, IntegrityError
from tests.hub_server import Hub
from tests.model_training.toy_corpus import config_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    """A run of three steps with an average, and with numbers of an evaluation."""
    folder = tmp_path_factory.mktemp("run") / "tiny-run"
    evaluation = {"corpus": str(world), "images": 2, "pictures": 0, "max_new_tokens": 8, "steps": 2}
    config = config_of(folder, world, steps=3, ema_decay=0.5, evaluation=evaluation)
    fit(config)
    assert config.evaluation
    held_out.evaluate_held_out(folder / "model", config.evaluation, folder, "cpu")
    return folder


def head(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_run_becomes_a_repository_that_loads_as_the_model_does(run, world, tmp_path):
    repository = publish.plan_repository(run, "Tiny")
    written = publish.write_repository(repository, tmp_path / "repo")
    names = {path.relative_to(tmp_path / "repo").as_posix() for path in written}
    assert names == {"README.md", *repository.files} and "model.safetensors" in names
    for name in repository.files:
        assert (tmp_path / "repo" / name).read_bytes() == (run / "model" / name).read_bytes()
    loaded = RegionCaptioner.load(tmp_path / "repo", "cpu")
    before = RegionCaptioner.load(run / "model", "cpu")
    weights = before.model.state_dict()
    assert all(weights[name].equal(each) for name, each in loaded.model.state_dict().items())
    assert loaded.processor.tokenizer.get_vocab() == before.processor.tokenizer.get_vocab()


def test_the_card_says_what_the_run_says(run):
    card = publish.plan_repository(run, "Tiny").card
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    assert "Trained with ParaCaption for 3 steps from random weights, with the tokenizer `toy`." in card
    assert "| corpus `.../corpus` | all | 1 |" in card
    assert (
        f"| `regions` | {summary['regions']:,} |" in card and f"| `exact` | {summary['exact']:.4g} |" in card
    )
    assert "seconds" not in card.partition("## Evaluation")[2].partition("## Configuration")[0]
    values = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert values["steps"] == 3 and values["out"] == "."


def test_the_averaged_model_has_no_numbers_of_the_other_one(run):
    card = publish.plan_repository(run / "model-average", "Tiny").card
    assert "The weights are a moving average (decay 0.5)." in card and "## Evaluation" not in card


def test_nothing_is_stated_that_nobody_said(run):
    plain = publish.plan_repository(run, "Tiny")
    assert not {"license", "base_model", "datasets"} & set(head(plain.card))
    assert "The license of this model is not stated here." in plain.card
    said = publish.plan_repository(run, "Tiny", "apache-2.0", "org/base", ["org/data"])
    found = head(said.card)
    assert (found["license"], found["base_model"]) == ("apache-2.0", "org/base")
    assert found["datasets"] == ["org/data"] and found["library_name"] == "paracaption"
    assert "not stated" not in said.card


def test_a_model_outside_a_run_says_that_its_training_is_not_known(run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "model")
    card = publish.plan_repository(tmp_path / "model", "Tiny").card
    assert "The files do not say how the model was trained." in card
    assert "Configuration" not in card and "Evaluation" not in card


def test_no_file_names_the_machine_or_its_user(run, tmp_path, tmp_path_factory):
    publish.write_repository(publish.plan_repository(run, "Tiny"), tmp_path / "repo")
    names = [str(tmp_path_factory.getbasetemp()).encode()]
    if len(getpass.getuser()) > 4:
        names.append(getpass.getuser().encode())
    for path in (tmp_path / "repo").rglob("*"):
        assert not any(name in path.read_bytes() for name in names), path


def test_only_files_of_the_model_are_published(run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "model")
    for name in ("notes.txt", ".hidden.json", "README.md"):
        (tmp_path / "model" / name).write_text("mine")
    repository = publish.plan_repository(tmp_path / "model", "Tiny")
    assert repository.left_out == [".hidden.json", "README.md", "notes.txt"]
    publish.write_repository(repository, tmp_path / "repo")
    assert "mine" not in (tmp_path / "repo" / "README.md").read_text()
    assert not (tmp_path / "repo" / "notes.txt").exists()


def test_what_is_no_model_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="neither a training run with a model"):
        publish.plan_repository(tmp_path, "Tiny")
    shutil.copytree(run / "model", tmp_path / "pickled")
    (tmp_path / "pickled" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"optimizer\.pt: this is a pickle"):
        publish.plan_repository(tmp_path / "pickled", "Tiny")
    shutil.copytree(run / "model", tmp_path / "other")
    config = json.loads((run / "model" / "config.json").read_text()) | {"model_type": "llava"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="model_type is 'llava', not 'perceptiondlm'"):
        publish.plan_repository(tmp_path / "other", "Tiny")


def test_a_damaged_file_of_the_run_is_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "evaluation" / "summary.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"summary\.json: not readable"):
        publish.plan_repository(tmp_path / "run", "Tiny")
    (tmp_path / "run" / "config.yaml").write_text("steps: many")
    with pytest.raises(IntegrityError, match=r"config\.yaml: not the configuration that a training run"):
        publish.plan_repository(tmp_path / "run", "Tiny")


def test_the_command_prints_or_writes_and_the_hub_takes_the_folder(run, tmp_path):
    to = tmp_path / "tiny-repo"
    given = ["models", "publish", str(run), "--to", str(to), "--license", "mit"]
    done = CliRunner().invoke(app, [*given, "--dry-run"])
    assert done.exit_code == 0 and not to.exists()
    printed = done.stdout.partition("\n---\n")
    assert CliRunner().invoke(app, given).exit_code == 0
    card = (to / "README.md").read_text()
    assert card == f"---\n{printed[2]}" and card.split("---\n")[2].strip().startswith("# tiny-repo")
    with Hub() as server:
        server.upload(to, "model")
    written = {path.relative_to(to).as_posix(): path.read_bytes() for path in to.rglob("*") if path.is_file()}
    assert server.committed == written
    again = CliRunner().invoke(app, given)
    assert isinstance(again.exception, ConfigError) and "already exists" in str(again.exception)
