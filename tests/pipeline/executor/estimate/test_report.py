"""An estimate in the terminal."""

from __future__ import annotations

import math

from rich.console import Console

from paracaption.pipeline.executor.estimate.rates import StageRate
from paracaption.pipeline.executor.estimate.report import find_caveats, render_estimate
from paracaption.pipeline.executor.estimate.sizes import Size, paper_size
from tests.pipeline.executor.estimate.cases import config, measured


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
    console.print(render_estimate(config(), known, sizes, 8, None, None))
    text = console.export_text()
    assert "bottleneck: caption" in text and "coconut: captioner [7, 7], judge [1, 1]" in text
    hours = 3_400_000 * (0.5 + 0.9 * 0.05) / 3600
    assert f"{hours:,.1f} in use" in text
    assert f"{math.ceil(334_000 / 100):,}" in text and "33.4 GB" in text
