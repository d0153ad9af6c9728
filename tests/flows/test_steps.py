"""What Prefect's page calls a run of a flow."""

from types import SimpleNamespace

import pytest
from prefect.runtime import flow_run

from paracaption.flows import build, evaluate, train
from paracaption.flows.steps import run_name


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"out": "/shared/coconut-v2"}, "coconut-v2"),
        ({"out": "/shared/coconut-v2/"}, "coconut-v2"),
        (SimpleNamespace(out="/runs/stage-1"), "stage-1"),
        ({"out": "/results", "label": "ours"}, "results/ours"),
        ({"out": "/" + "x" * 300}, "x" * 100),
        ({"out": 3}, "3"),
        ({}, "no corpus"),
        ("nonsense", "no corpus"),
        (None, "no corpus"),
    ],
)
def test_a_run_is_named_after_its_corpus_and_an_evaluation_after_its_label_too(monkeypatch, config, name):
    monkeypatch.setattr(flow_run, "parameters", {"config": config}, raising=False)
    assert run_name() == name


def test_every_flow_has_its_runs_named_so():
    flows = (build.build_corpus, train.train_captioner, evaluate.evaluate_captioner)
    assert [flow.flow_run_name for flow in flows] == [run_name] * 3
