"""What is known to fail before a training run or an evaluation starts, checked in a second, without torch.

Each function yields findings, as `paracaption doctor` shows them; `refuse_failures` stops at a FAIL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..model_training.decoding.region_captioner import check_saved_model
from ..pipeline.corpus import reader
from ..pipeline.executor import gpus
from ..pipeline.executor.findings import FAIL, Finding, try_check
from ..pipeline.executor.packages import check_backend_packages, check_modules
from ..pipeline.executor.preflight import check_backend, check_output, check_tokenizer
from ..pipeline.io import files
from ..schemas.config import Backend
from ..schemas.errors import ConfigError
from ..schemas.evaluation import Bench, EvaluateConfig, Judge
from ..schemas.harness import Harness
from ..schemas.training import Model, TrainConfig

NETWORK_MODULES = ("torch", "transformers")
"""Modules that PerceptionDLM needs besides those of the base package."""


def check_training(config: TrainConfig, wait: bool = False, on_cluster: bool = False) -> Iterator[Finding]:
    """Check what a training run needs. Never raises for what it checks.

    Args:
        config: of the run.
        wait: whether the run waits for its corpora, so that they need not exist yet.
        on_cluster: whether the run's workers are on other machines, whose GPUs cannot be seen from here.
    """
    yield from check_modules((*NETWORK_MODULES, "tensorboard", *(["peft"] if config.lora else [])))
    yield _check("model", _find_model, config.model)
    for number, corpus in enumerate(config.corpora):
        yield _check(f"corpora[{number}].corpus", _find_corpus, corpus.corpus, corpus.subsets, wait)
    for number, source in enumerate(config.conversations):
        where = f"conversations[{number}]"
        yield _check(f"{where}.path", _find_conversations, source.path)
        if source.images:
            yield _check(f"{where}.images", _find_folder, source.images)
    if config.evaluation:
        yield _check("evaluation.corpus", _find_corpus, config.evaluation.corpus, None, wait)
    if config.device == "cuda" and not on_cluster and not gpus.list_gpus():
        found = "cuda is asked for, and this machine shows no GPU"
        yield Finding("device", FAIL, found, "set device: auto")
    yield check_output(config.out)


def check_evaluation(config: EvaluateConfig) -> Iterator[Finding]:
    """Check what an evaluation needs. Never raises for what it checks."""
    yield from _check_captioner(config)
    if config.judge:
        yield from _check_judge("judge", config.judge)
    for bench in config.benchmarks:
        if bench.judge:
            yield from _check_judge(f"benchmark {bench.name}: judge", bench.judge)
        begun = (Path(config.out) / config.label / bench.name).exists()
        needs_photos = config.captioner.name != "predictions" and not begun
        yield _check(f"benchmark {bench.name}", _find_benchmark, bench, needs_photos)
    if config.toy:
        yield _check("toy", _find_corpus, config.toy, None, None)
    if config.profile:
        yield _check("profile.corpus", _find_corpus, config.profile.corpus, None, None)
    if config.harness:
        yield _check("harness", _find_harness, config.harness)
    yield check_output(config.out)


def _check(subject: str, find: Callable[..., str], *args: Any) -> Finding:
    return try_check(subject, "correct it in the configuration", find, *args)


def _check_judge(subject: str, judge: Judge) -> Iterator[Finding]:
    backend = Backend(name=judge.name, options=judge.options)
    yield from check_backend_packages("judge", backend)
    yield _check(f"{subject}.options", _find_judge, judge, backend)


def _check_captioner(config: EvaluateConfig) -> Iterator[Finding]:
    backend = config.backend()
    if backend.name == "perceptiondlm":
        yield from check_modules(NETWORK_MODULES)
        yield _check("captioner.options.model", _find_saved_model, backend.options.get("model"))
    elif backend.name == "predictions":
        for bench in config.benchmarks:
            yield _check(f"captioner for {bench.name}", _find_predictions, config.backend(bench))
    else:
        yield from check_backend_packages("captioner", backend)
        yield check_backend("captioner", backend)


# Each returns what it found, or raises a `ConfigError` that says what is missing and what to do.


def _find_model(chosen: Model) -> str:
    if chosen.path is not None:
        return _find_saved_model(chosen.path)
    if chosen.tokenizer != "toy" and not (Path(chosen.tokenizer or "") / "tokenizer.json").is_file():
        path = Path(chosen.tokenizer or "") / "tokenizer.json"
        raise ConfigError(f"tokenizer: {path}: no such file; name the folder of a tokenizer")
    return f"a new model with the tokenizer {chosen.tokenizer}"


def _find_harness(harness: Harness) -> str:
    from ..model_training.evaluation.harness import check_installed

    version = check_installed()
    for task in harness.chosen():
        if task.include is not None and not Path(task.include).is_dir():
            raise ConfigError(f"{task.include}: no such folder; name the folder of the task {task.name}")
    return f"lmms-eval {version}, {len(harness.chosen())} benchmarks"


def _find_saved_model(name: object) -> str:
    if not isinstance(name, str):
        raise ConfigError("not given; name the folder of a saved PerceptionDLM")
    check_saved_model(Path(name))
    return f"{name} is a saved model"


def _find_corpus(out: str, subsets: tuple[str, ...] | None, wait: bool | None) -> str:
    """`wait`: whether the run waits for the corpus; None where it cannot wait."""
    try:
        available = {unit.subset for unit in reader.open_corpus(out).units()}
    except ConfigError:
        available = set()
    missing = sorted(set(subsets or ()) - available)
    if available and not missing:
        return f"{out} has committed units"
    if wait:
        return f"{out} is waited for"
    problem = f"the corpus {out} has no subset {missing[0]}" if available else f"no corpus at {out}"
    others = ", or name" if wait is None else ", wait for it with --wait, or name"
    raise ConfigError(f"{problem}; build it first{others} the `out` of a build")


def _find_predictions(backend: Backend) -> str:
    from ..model_training.evaluation import captioners

    found = captioners.read_predictions(captioners.prediction_options(backend))
    return f"{len(found):,} captions"


def _find_conversations(path: str) -> str:
    from ..model_training.data.conversation_records import list_files

    if files.is_url(path):
        return f"{path} is read when the run starts"
    found = list_files(path)
    return f"{path} exists" if found == [path] else f"{path}: {len(found):,} files"


def _find_folder(path: str) -> str:
    if not files.is_url(path) and not Path(path).is_dir():
        raise ConfigError(f"{path}: no such folder; name the folder of the photos")
    return f"{path} exists"


def _find_judge(judge: Judge, backend: Backend) -> str:
    from ..model_training.evaluation import judges

    judges.identity(judge)
    check_tokenizer("judge", backend)
    return "its options fit"


def _find_benchmark(bench: Bench, needs_photos: bool) -> str:
    from ..model_training.evaluation import annotations

    read = annotations.read_benchmark(bench.folder, bench.kind, bench.photos)
    if needs_photos and bench.on_missing_photo == "error":
        named = {image.photo for image in read.images[: bench.images]}
        missing = [photo for photo in read.missing_photos() if photo in named]
        if missing:
            raise ConfigError(annotations.describe_missing(missing))
    return f"{bench.folder} is as published"
