"""The tutorial's commands and programs run, in their order, in one folder."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"
pytestmark = pytest.mark.skipif(not TUTORIAL.exists(), reason="no clone, but an installed wheel")
BLOCK = re.compile(r"(<!-- not run -->\n)?```(bash|python|yaml)\n(.*?)```", re.DOTALL)


def run(kind: str, text: str, folder: Path) -> str:
    """Do what a reader does with a block: run it, or save it under the name in its first line."""
    if kind == "yaml":
        (folder / text.partition("\n")[0].removeprefix("# ")).write_text(text)
        return ""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-c", text] if kind == "python" else ["bash", "-euc", text]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.soak
def test_what_a_reader_of_the_tutorial_runs_ends_well_and_shows_what_the_page_says(tmp_path):
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    printed = {
        text: run(kind, text, tmp_path)
        for skipped, kind, text in BLOCK.findall(TUTORIAL.read_text())
        if not skipped
    }
    output = "\n".join(printed.values())
    listed = next(shown for text, shown in printed.items() if "drop_reason" in text)
    assert len(listed.splitlines()) > 3, "the sample has dropped regions to look at"
    assert "agree with segmenter" in output
    lost = next(shown for text, shown in printed.items() if "paracaption diff" in text)
    assert "iou_low" in lost
    assert (tmp_path / "mine" / "coco" / "instances.json").exists()
    assert (tmp_path / "out" / "chelsea.png").exists()
