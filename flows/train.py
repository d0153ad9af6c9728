"""The flow that trains a captioner: wait for the corpora, train, export, evaluate.

Annotations are evaluated, as in `build`.
"""

import time
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from ..schemas.training import CorpusSource, TrainConfig
from . import artifacts, callbacks, served
from .steps import run_name, step

_CHECK_EVERY_S = 30.0


@flow(name="train-captioner", flow_run_name=run_name, log_prints=False)
def train_captioner(
    config: TrainConfig, ray_address: str | None = None, wait: bool = False
) -> dict[str, Any]:
    """A corpus in, a captioner out.

    Args:
        config: the training run.
        ray_address: "auto" or "host:port"; None starts Ray on this machine, if the run has workers.
        wait: wait until all corpora are built. Otherwise the run trains on the units that are committed.

    Returns:
        `steps` and `skipped` (numbers of steps), `model` (the path of its folder), `left_out` (number of
        images that were not trained on, by reason), and `evaluation` if the configuration has one.
    """
    served.check_run(config, ray_address)
    if wait:
        wait_for_corpora(config)
    done = train(config, ray_address)
    publish_curves(config)
    if config.evaluation:
        done["evaluation"] = evaluate(config, done["model"])
    artifacts.PUBLISHER.wait()
    return done


@step
def wait_for_corpora(config: TrainConfig) -> None:
    """Wait until every unit of every corpus is committed and merged."""
    from ..model_training.data.corpus import unfinished

    held_out = [CorpusSource(corpus=config.evaluation.corpus)] if config.evaluation else []
    for source in [*config.corpora, *held_out]:
        logged = ""
        while missing := unfinished(source):
            if missing != logged:
                get_run_logger().warning("waiting for %s: %s", source.corpus, missing)
                logged = missing
            time.sleep(_CHECK_EVERY_S)


@step
def train(config: TrainConfig, ray_address: str | None) -> dict[str, Any]:
    """Train from the last checkpoint, or from the start, and write the model."""
    from ..model_training.train import ray_train
    from ..pipeline.executor import ray_data

    ray_data.check_address(ray_address)
    outcome = ray_train.train(config, ray_address, callbacks.on_training_step.get())
    return outcome._asdict() | {"model": str(outcome.model)}


@step
def publish_curves(config: TrainConfig) -> None:
    """Publish the loss curve, OUT/loss.png, and the numbers of the last step."""
    from ..model_training.train import curves, metrics

    out = Path(config.out)
    curves.draw_loss_curves({out.name: out}, out / "loss.png")
    curves_page = f"# {out}\n\n{artifacts.embedded(out / 'loss.png')}\n"
    artifacts.publish_markdown("training-loss", curves_page)
    rows = [
        {name: round(value, 4) if isinstance(value, float) else value for name, value in record.items()}
        for record in metrics.read_metrics(out)[-1:]
    ]
    artifacts.publish_table("training-last-step", rows, f"{out}: the last step")


@step
def evaluate(config: TrainConfig, model: str) -> dict[str, Any]:
    """Caption images that were not trained on, and write pictures and scores to OUT/evaluation."""
    from ..model_training.evaluation import held_out

    assert config.evaluation
    summary = held_out.evaluate_held_out(Path(model), config.evaluation, Path(config.out), config.device)
    folder = Path(config.out) / held_out.FOLDER
    pictures = sorted((folder / "pictures").iterdir())
    lines = [f"# {model}", "", "| | |", "| --- | --- |"]
    lines += [
        f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in summary._asdict().items()
    ]
    lines += ["", *(artifacts.embedded(picture) for picture in pictures)]
    artifacts.publish_markdown("sample-captions", "\n".join(lines))
    return summary._asdict()
