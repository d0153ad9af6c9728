"""What is known to fail before a training run or an evaluation starts: a look of a second, without torch.

Each function gives findings, as `paracaption doctor` shows them; `findings.refuse` stops at a FAIL.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from ..pipeline.corpus import reader
from ..pipeline.executor import gpus, preflight
from ..pipeline.executor.findings import FAIL, OK, Finding, how_to_install
from ..pipeline.executor.preflight import one_line, output_folder
from ..pipeline.io import files
from ..schemas.config import Backend
from ..schemas.errors import ConfigError, ParaCaptionError
from ..schemas.evaluation import Bench, EvaluateConfig, Judge
from ..schemas.training import Model, TrainConfig

NETWORK = ("torch", "transformers")
"""Modules that PerceptionDLM needs beside those of the base package."""


def training(config: TrainConfig, wait: bool = False, on_cluster: bool = False) -> Iterator[Finding]:
    """What stands in the way of a training run, and what does not. Never raises for what it looks at.

    Args:
        config: of the run.
        wait: the run waits for its corpora, so that they need not be there yet.
        on_cluster: the run's workers are on other machines, whose GPUs cannot be seen from here.
    """
    needed = (*NETWORK, "tensorboard", *(["peft"] if config.lora else []))
    yield from modules(needed)
    yield _look("model", lambda: _model(config.model))
    for number, corpus in enumerate(config.corpora):
        yield _look(f"corpora[{number}].corpus", lambda: _corpus(corpus.corpus, corpus.subsets, wait))  # noqa: B023
    for number, source in enumerate(config.conversations):
        where = f"conversations[{number}]"
        yield _look(f"{where}.path", lambda: _file(source.path))  # noqa: B023
        if source.images:
            yield _look(f"{where}.images", lambda: _folder(source.images))  # noqa: B023
    if config.evaluation:
        held_out = config.evaluation.corpus
        yield _look("evaluation.corpus", lambda: _corpus(held_out, None, wait))
    if config.device == "cuda" and not on_cluster and not gpus.seen():
        yield Finding("device", FAIL, "cuda is asked for, and this machine shows no GPU", "set device: auto")
    yield output_folder(config.out)


def evaluation(config: EvaluateConfig) -> Iterator[Finding]:
    """What stands in the way of an evaluation, and what does not. Never raises for what it looks at."""
    yield from _captioner(config.backend())
    if config.judge:
        yield from _judge(config.judge)
    for bench in config.benchmarks:
        begun = (Path(config.out) / config.label / bench.name).exists()
        wanted = config.captioner.name != "predictions" and not begun
        yield _look(f"benchmark {bench.name}", lambda: _benchmark(bench, wanted))  # noqa: B023
    if config.toy:
        toy = config.toy
        yield _look("toy", lambda: _corpus(toy, None, None))
    if config.profile:
        scenes = config.profile.scenes
        yield _look("profile.scenes", lambda: _corpus(scenes, None, None))
    yield output_folder(config.out)


def modules(names: tuple[str, ...]) -> Iterator[Finding]:
    """Whether modules can be imported, without importing them."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            yield Finding("packages", FAIL, f"{name} is not installed", how_to_install(name))
        else:
            yield Finding("packages", OK, f"{name} is installed")


def _look(what: str, look: Callable[[], str]) -> Finding:
    """The finding of a look that says what is there, or raises."""
    try:
        return Finding(what, OK, look())
    except Exception as error:  # noqa: BLE001 - a remote file system may raise anything
        text = str(error) if isinstance(error, ParaCaptionError) else one_line(error)
        said, _, advice = text.removeprefix(f"{what}: ").partition("; ")
        return Finding(what, FAIL, said, advice or "correct it in the configuration")


def _model(chosen: Model) -> str:
    if chosen.path is not None:
        saved_model(Path(chosen.path))
        return f"{chosen.path} is a saved model"
    if chosen.tokenizer != "toy" and not (Path(chosen.tokenizer or "") / "tokenizer.json").is_file():
        path = Path(chosen.tokenizer or "") / "tokenizer.json"
        raise ConfigError(f"tokenizer: {path}: no such file; name the folder of a tokenizer")
    return f"a new model with the tokenizer {chosen.tokenizer}"


def saved_model(folder: Path) -> None:
    """Refuse a folder that is no saved PerceptionDLM.

    Raises:
        ConfigError: a file is missing, or the config is not JSON of ours; names it.
    """
    from ..pipeline.io import weights

    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; name a folder that `paracaption models convert` wrote")
    try:
        kind = json.loads(path.read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: not the config of a model ({error}); convert the model again") from error
    if kind != "perceptiondlm":
        raise ConfigError(f"{path}: a {kind!r}; convert a published model with `paracaption models convert`")
    weights.safetensors_files(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"{folder / 'tokenizer.json'}: no such file; convert the model again")


def _corpus(out: str, subsets: tuple[str, ...] | None, wait: bool | None) -> str:
    """What is there. `wait`: whether it is waited for; None where nothing can be waited for."""
    if files.is_url(out):
        return f"{out} is looked at when the run starts"
    try:
        there = {each for each in reader.subsets(out) if reader.manifest_paths(out, each)}
    except ConfigError:
        there = set()
    missing = sorted(set(subsets or ()) - there)
    if there and not missing:
        return f"{out} has committed units"
    if wait:
        return f"{out} is waited for"
    what = f"the corpus {out} has no subset {missing[0]}" if there else f"no corpus at {out}"
    others = ", name the `out` of a build, or wait for it with --wait"
    if wait is None:
        others = ", or name the `out` of a build"
    raise ConfigError(f"{what}; build it first{others}")


def _file(path: str) -> str:
    if not files.is_url(path) and not Path(path).is_file():
        raise ConfigError(f"{path}: no such file; name a .json, .jsonl or .parquet")
    return f"{path} is there"


def _folder(path: str) -> str:
    if not files.is_url(path) and not Path(path).is_dir():
        raise ConfigError(f"{path}: no such folder; name the folder of the photos")
    return f"{path} is there"


def _captioner(backend: Backend) -> Iterator[Finding]:
    if backend.name == "perceptiondlm":
        yield from modules(NETWORK)
        model = backend.options.get("model")
        yield _look("captioner.options.model", lambda: _named_model(model))
    elif backend.name == "predictions":
        path = backend.options.get("path")
        yield _look("captioner.options.path", lambda: _file(str(path)))
    else:
        yield from preflight.backend_packages("captioner", backend)
        yield preflight.backend_options("captioner", backend)


def _named_model(model: object) -> str:
    if not isinstance(model, str):
        raise ConfigError("not given; name the folder of a saved PerceptionDLM")
    saved_model(Path(model))
    return f"{model} is a saved model"


def _judge(judge: Judge) -> Iterator[Finding]:
    from ..model_training.evaluation import judges

    backend = Backend(name=judge.name, options=judge.options)
    yield from preflight.backend_packages("judge", backend)

    def look() -> str:
        judges.identity(judge)
        preflight.tokenizer("judge", backend)
        return "its options fit"

    yield _look("judge.options", look)


def _benchmark(bench: Bench, photos_wanted: bool) -> str:
    from ..model_training.evaluation import annotations

    read = annotations.read(bench.folder, bench.kind, bench.photos)
    if photos_wanted and bench.on_missing_photo == "error":
        named = {image.photo for image in read.images[: bench.images]}
        missing = [photo for photo in read.missing_photos() if photo in named]
        if missing:
            raise ConfigError(
                f"{missing[0]}: no such photo, and {len(missing) - 1} others are missing; put them there, "
                "name their folder in `photos`, or leave them out with on_missing_photo: skip"
            )
    return f"{bench.folder} is as published"
