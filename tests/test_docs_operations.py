"""`docs/operations.md`: the messages in its tables are ours, and the links to its sections lead there."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from paracaption.schemas.reasons import Reason

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "operations.md"
FOLDERS = ("schemas", "filters", "pipeline", "model_training", "flows")
pytestmark = pytest.mark.skipif(not (ROOT / "pipeline").exists(), reason="no clone, but an installed wheel")

NO_MESSAGES = {"doctor", "estimate", "inspect", "busy", "runtime_env", "OutOfMemory", "EngineLost"}
"""What the first column names besides messages: commands, a column, an option, errors."""


@cache
def written() -> str:
    """Every text of the code, as one line: what is split over several literals is joined."""
    code = [path.read_text() for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    joined = re.sub(r'"\s*\n\s*(?:f|r)?"', "", "\n".join(code))
    return re.sub(r"\{[^{}\"']*\}", "N", joined)


def symptoms() -> list[str]:
    """What stands in backticks in the first column of the tables under "From symptom to remedy"."""
    section = PAGE.read_text().split("## From symptom to remedy")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \|", section, re.MULTILINE)
    return [text for row in rows for text in re.findall(r"`([^`]+)`", row)]


def test_every_message_of_the_tables_is_one_that_the_code_writes():
    found = [each for each in symptoms() if each not in NO_MESSAGES and each not in set(Reason)]
    assert len(found) > 35
    missing = [each for each in found if not _is_written(each)]
    assert missing == [], "no code writes this: correct docs/operations.md"


def _is_written(symptom: str) -> bool:
    parts = [re.escape(part.strip()) for part in re.split(r"\b(?:N|SUBSET|OTHER)\b", symptom)]
    return re.search(r"\W*\w?N?\W*".join(parts), written()) is not None


def test_every_link_to_a_section_of_the_page_has_that_section():
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", PAGE.read_text(), flags=re.DOTALL), re.MULTILINE
    )
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    places = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    links = {
        (path.name, anchor)
        for path in places
        for page, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", path.read_text())
        if Path(page).name == "operations.md" or (path == PAGE and not page)
    }
    assert {
        "what-lies-in-out-and-who-may-write-there",
        "when-a-source-fails",
        "versions-look-back-compare-undo",
    } <= {anchor for _, anchor in links}
    assert [link for link in links if link[1] not in anchors] == []


def test_a_word_that_no_code_writes_is_found_to_be_missing():
    assert not _is_written("no such message was ever written")
    assert _is_written("no progress for N s")
