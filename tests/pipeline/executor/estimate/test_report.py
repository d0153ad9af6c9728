"""An estimate in the terminal."""

from __future__ import annotations

import math

import msgspec
from rich.console import Console

from paracaption.pipeline.executor.estimate.rates import StageRate
from paracaption.pipeline.executor.estimate.report import find_caveats, make_estimates, render_estimate
from paracaption.pipeline.executor.estimate.sizes import Size, paper_size
from tests.pipeline.executor.estimate.cases import MIXED, config, measured, mixed_config, mixed_rates


def test_what_makes_an_estimate_doubtful_is_listed():
    known = measured(caption=StageRate(1, 0, 0.1))
    caveats = find_caveats(
        config(), known, {"coconut": Size(100_000, 4_000_000)}, config(judge={"name": "openai"})
    )
    assert any("only 1,000 regions, the estimate is for 4,000,000" in line for line in caveats)
    assert any("verify_category" in line and "had no work" in line for line in caveats)
    assert any("10.0 regions an image, the estimate 40.0" in line for line in caveats)
    assert any(line.startswith("judge: the pilot ran openai") for line in caveats)


def test_the_report_names_the_bottleneck_the_gpus_and_the_bytes():
    known = measured(
        caption=StageRate(1, 0, 0.5, load_s=60), verify_category=StageRate(0.9, 0, 0.05, load_s=90)
    )
    console = Console(width=160, record=True, file=open("/dev/null", "w"))
    sizes = {"coconut": paper_size(config(), "coconut")}
    console.print(render_estimate(make_estimates(config(), known, sizes, 8, None, None)))
    text = console.export_text()
    assert "bottleneck: caption" in text and "captioner [7, 7], judge [1, 1]" in text
    hours = 3_400_000 * (0.5 + 0.9 * 0.05) / 3600
    assert f"{hours:,.1f} in use" in text
    assert f"{math.ceil(334_000 / 100):,}" in text and "33.4 GB" in text


def shown_text(shown, width=80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(render_estimate(shown))
    return console.export_text()


def test_the_report_says_which_gpus_are_idle_and_fits_into_80_columns():
    sizes = {name: Size(80 * size.images, 80 * size.regions) for name, size in MIXED.items()}
    text = shown_text(make_estimates(mixed_config(), mixed_rates(load_s=90), sizes, 7, None, None))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and "\N{HORIZONTAL ELLIPSIS}" not in text
    start = next(number for number, line in enumerate(lines) if line.startswith("GPUs of"))
    assert [line.split() for line in lines[start : start + 4]] == [
        ["GPUs", "of", "GPUs", "GPU-hours", "busy", "idle", "idle", "share"],
        ["captioner", "5", "222.2", "0.1", "0%"],
        ["judge", "1", "24.4", "20.0", "45%"],
        ["segmenter", "1", "33.3", "11.1", "25%"],
    ]
    joined = " ".join(text.split())
    assert "coconut and sa1b side by side: 44.5 h, of which 90 s start-up; bottleneck: captioner" in joined
    assert "one after the other they would take 55.7 h" in joined
    assert "captioner [5, 5], judge [1, 1], segmenter [1, 1]" in joined


def test_without_gpus_for_all_the_report_has_a_table_for_each_subset_and_says_how_many_are_needed():
    segmenter = {"name": "sam3", "num_gpus": 1, "concurrency": [2, 2]}
    other = {"stage": "caption", "captioner": {"name": "gar", "num_gpus": 1, "concurrency": [1, 1]}}
    recipe = ["usable_masks", other, "extract_category", "agree_with_segmenter"]
    source = {"source": "sa1b", "paths": ["/a.tar"]}
    large = mixed_config(
        sa1b=None, segmenter=segmenter, subsets={"big": {"sources": source, "recipe": recipe}}
    )
    known = mixed_rates()
    known.subsets["big"] = known.subsets.pop("sa1b")
    sizes = {"coconut": MIXED["coconut"], "big": MIXED["sa1b"]}
    text = shown_text(make_estimates(large, known, sizes, 6, None, None))
    configured = text.partition("balanced:")[0]
    assert "side by side" not in configured and configured.count("actors of") == 2
    joined = " ".join(text.split())
    assert "With 9 GPUs the subsets are built side by side" in joined


def test_a_pool_of_many_models_leaves_the_numbers_of_an_80_column_table_whole():
    known = measured(caption=StageRate(1, 0, 0.5), verify_category=StageRate(0.9, 0, 0.05))
    models = {key: {"name": name} for key, name in (("captioner", "classical"), ("judge", "lexical"))}
    again = {"stage": "caption", "id": "second_caption", "captioner": {"name": "classical"}}
    recipe = ["usable_masks", again, "caption", "verify_category", "clean_text"]
    source = {"source": "coconut", "annotations": ["/a.json"], "labels": "/l", "photos": ["/p"]}
    subsets = {"coconut": {"sources": source, "recipe": recipe}}
    known.subsets["coconut"].stages["second_caption"] = StageRate(1, 0, 0.5)
    built = config(subsets=subsets, coconut=None, **models)
    text = shown_text(make_estimates(built, known, {"coconut": Size(100, 1_000)}, None, None, None))
    assert "work of one" in text and "share of the wall" in text and "…" not in text
    assert "Ray is asked for 1 CPU core\n" in text


def test_the_values_of_json_have_pools_with_their_idle_seconds():
    shown = make_estimates(mixed_config(), mixed_rates(), MIXED, 7, None, None)
    values = msgspec.to_builtins(shown._asdict())
    assert set(values) == {"configured", "balanced", "advice", "caveats"}
    pools = {each["title"]: each for each in values["configured"]["pools"]}
    assert pools["segmenter"]["idle_s"] == shown.configured.wall_s - 1_500
    assert values["configured"]["streams"][0]["subsets"] == ["coconut", "sa1b"]
    assert values["configured"]["apart_s"] > values["configured"]["wall_s"]
