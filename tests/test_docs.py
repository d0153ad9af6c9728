"""The documents name files that exist, and link to pages that exist."""

import re
import subprocess
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "samples" / "README.md"]
FOLDERS = "schemas|filters|pipeline|model_training|flows|tests|benchmarks|configs|samples|docs"
ROOMS = FOLDERS.partition("|tests")[0]
DOTTED = re.compile(rf"`((?:paracaption|(?:{ROOMS})(?=\.\w+\.\w))\.\w[\w.]*)`")
NAMED = re.compile(rf"(?<![\w/.])(?:{FOLDERS})/[\w/.-]*[\w/](?![\w/.*-])")
pytestmark = pytest.mark.skipif(not (ROOT / "pipeline").exists(), reason="no clone, but an installed wheel")
LINKED = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_names_or_links_to_exists(page):
    text = page.read_text()
    named = {name for name in NAMED.findall(text) if not (ROOT / name).exists()}
    linked = {name for name in LINKED.findall(text) if not (page.parent / name).exists()}
    assert (named, linked) == (set(), set())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_module_that_a_page_names_can_be_imported(page):
    for name in DOTTED.findall(page.read_text()):
        assert name.startswith("paracaption."), f"{name}: what is installed is called paracaption.{name}"
        module, _, attribute = name.rpartition(".")
        assert find_spec(name) or hasattr(import_module(module), attribute), name


def test_every_commit_that_blame_skips_is_one_of_ours():
    if (ROOT / ".git" / "shallow").exists() or not (ROOT / ".git").exists():
        pytest.skip("no history here")
    lines = (ROOT / ".git-blame-ignore-revs").read_text().splitlines()
    for commit in (line for line in lines if not line.startswith("#")):
        command = ["git", "merge-base", "--is-ancestor", commit, "HEAD"]
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0, commit
