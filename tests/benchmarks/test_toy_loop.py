"""The closed loop on a world so small that both models learn it: a model labels masks for the next one."""

import pytest

from benchmarks import toy_loop
from paracaption.model_training.toy.world import WorldOptions

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

WORLD = WorldOptions(
    canvas=((64, 64),),
    unit_px=10.0,
    regions=(2, 3),
    sizes=("large",),
    textures=("plain",),
    shapes=("circle", "triangle", "bar"),
    places=False,
    noise=3.0,
)

TRAINING = {
    "model": {
        "config": {
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 64,
                "patch_size": 8,
            },
            "text_config": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
            },
            "max_tiles": 1,
            "replay_size": 2,
            "initializer_range": 0.1,
            "region_prompt_std": 0.05,
            "position_std": 0.3,
        }
    },
    "data": {"max_tokens": 768},
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    loop = toy_loop.Loop(folder, 200, 100, 40, steps=500, options=WORLD, training=TRAINING)
    return toy_loop.run_loop(loop, seed=0)


def test_labels_that_judge_and_filters_keep_are_right_more_often(result):
    labels = toy_loop.Labels(**result["labels"])
    assert 0 < labels.kept <= labels.regions == labels.kept + sum(labels.dropped.values())
    assert labels.kept_right / labels.kept >= labels.right / labels.regions > 0.2


def test_the_second_model_is_no_worse_than_chance_allows(result):
    first, second = (result[name]["parallel"] for name in ("first", "second"))
    assert first["regions"] == second["regions"] > 40
    assert second["exact"] >= first["exact"] - 0.15


def test_the_table_has_a_row_for_each_seed(result):
    lines = toy_loop.report({"0": result, "1": result}).splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["seed", "---", "0", "1"]
    assert len({line.count("|") for line in lines}) == 1
