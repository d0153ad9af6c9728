"""Lays a trained model out as a model repository: its files, and a card that says what is known of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from ...pipeline.io import files, weights, yaml_text
from ...schemas.errors import ConfigError, IntegrityError, one_line
from ...schemas.training import TrainConfig
from ..convert import leftovers
from ..evaluation import held_out
from . import metrics, model_card
from .export import EMA, MODEL
from .trainer import LEFT_OUT

CARD = "README.md"
_ENDINGS = {".json", ".safetensors", ".jinja"}
"""Files of a saved model: weights, configuration, tokenizer, processor, template."""


class Repository(NamedTuple):
    """A model repository before it is written.

    Attributes:
        folder: of the saved model.
        files: its files that are published, by their names in the repository, with their sizes in bytes.
        card: text of the card.
        left_out: names in the folder that are not published.
    """

    folder: Path
    files: dict[str, int]
    card: str
    left_out: list[str]

    @property
    def front_matter(self) -> str:
        """The head of the card, as YAML."""
        return self.card.split("---\n")[1]


def plan_repository(
    path: Path,
    title: str,
    license: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
) -> Repository:
    """Plan a repository; nothing is written.

    Args:
        path: a training run, whose `model/` is taken, or the folder of a saved model, which belongs to a run
            if it lies in one.
        title: of the card.
        license: identifier of the model's license on the hub.
        base_model: name on the hub of the model that it was trained from.
        datasets: names on the hub of what it was trained on.

    Raises:
        ConfigError: there is no model at that path, or it is not in our file format.
        IntegrityError: a file of the run is damaged.
    """
    folder, run = find_model(path)
    names = _names(folder)
    published = {name: (folder / name).stat().st_size for name in names}
    stated = model_card.Stated(title, license, base_model, tuple(datasets))
    card = model_card.render(stated, model_card.read_facts(folder), run and read_run(run, folder))
    others = {each.name for each in folder.iterdir()} - {name.partition("/")[0] for name in names}
    return Repository(folder, published, card, sorted(others))


def find_model(path: Path) -> tuple[Path, Path | None]:
    """The folder of the saved model that a path means, and that of its run if it has one.

    Raises:
        ConfigError: there is none, or not in our file format.
    """
    folder = path / MODEL if (path / MODEL / "config.json").is_file() else path
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{path}: neither a training run with a model (no {MODEL}/config.json) nor a saved model (no "
            "config.json)"
        )
    weights.folder(folder, "models publish")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != "perceptiondlm":
        raise ConfigError(
            f"{folder / 'config.json'}: model_type is {kind!r}, not 'perceptiondlm'; convert the model with "
            "`paracaption models convert`"
        )
    run = folder.parent
    is_run = folder.name in (MODEL, EMA) and (run / "config.yaml").is_file()
    return folder, run if is_run and (run / metrics.METRICS).is_file() else None


def _names(folder: Path) -> list[str]:
    """The files of a saved model, by their names in it."""
    aside = folder / leftovers.FOLDER
    found = [*folder.iterdir(), *(aside.iterdir() if aside.is_dir() else ())]
    names = [each for each in found if each.is_file() and each.suffix in _ENDINGS and each.name[0] != "."]
    return sorted(each.relative_to(folder).as_posix() for each in names)


def read_run(run: Path, folder: Path) -> model_card.RunFacts:
    """What a run says of the model in one of its folders.

    Raises:
        IntegrityError: a file of the run is damaged.
    """
    path = run / "config.yaml"
    try:
        config = TrainConfig.model_validate(yaml_text.parse(path.read_bytes()))
    except (OSError, yaml.YAMLError, ValidationError, TypeError) as error:
        what = f"not the configuration that a training run writes ({one_line(error)})"
        raise IntegrityError(
            f"{path}: {what}; publish the model's folder from a copy outside the run"
        ) from error
    averaged = folder.name == EMA
    evaluated = None if averaged else _read_json(run / held_out.FOLDER / "summary.json")
    return model_card.RunFacts(
        config, metrics.last_step(run), averaged, _read_json(run / LEFT_OUT) or {}, evaluated
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{path}: not readable ({one_line(error)}); delete it to leave it out"
        ) from error
    return found if isinstance(found, dict) else None


def write_repository(repository: Repository, to: Path) -> list[Path]:
    """Write a planned repository; it appears when it is whole.

    Args:
        repository: as `plan_repository` made it.
        to: a folder that does not exist yet, or is empty.

    Returns:
        The files that were written.

    Raises:
        ConfigError: the folder has something in it.
    """
    with files.write_folder_atomic(to) as temporary:
        for name in repository.files:
            target = temporary / name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(repository.folder / name, target)
        (temporary / CARD).write_text(repository.card, "utf-8")
    return [to / name for name in (CARD, *repository.files)]
