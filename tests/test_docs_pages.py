"""The guides: their links lead somewhere, and their commands, keys and questions are real."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.main import get_command

from paracaption.flows.cli.app import app
from paracaption.schemas.config import BuildConfig

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = (
    "api.md",
    "architecture.md",
    "benchmarks.md",
    "buckets.md",
    "data.md",
    "development.md",
    "embedded-backends.md",
    "estimate.md",
    "evaluation.md",
    "exit-codes.md",
    "experiments.md",
    "explorer.md",
    "exports.md",
    "faq.md",
    "filters.md",
    "format.md",
    "gar.md",
    "gpu-benchmark.md",
    "gpu.md",
    "judges.md",
    "mask-generators.md",
    "perceptiondlm.md",
    "publishing.md",
    "segmenters.md",
    "sources.md",
    "telemetry.md",
    "training.md",
)
pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="no clone, but an installed wheel")


@cache
def anchors(path: Path) -> set[str]:
    """The anchors that GitHub and the docs site make of a page's headings."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_anchor_of_a_link_is_a_heading_of_the_page_it_leads_to(page):
    links = re.findall(r"\]\(((?!https?:)[^)#\s]*)#([^)]+)\)", (DOCS / page).read_text())
    wrong = [(place, anchor) for place, anchor in links if anchor not in anchors(DOCS / (place or page))]
    assert wrong == []


def commands_of(page: str) -> list[list[str]]:
    """The words of each `paracaption ...` in code of a page, without what follows on the line."""
    text = (DOCS / page).read_text().replace("\\\n", " ")
    code = re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text)
    lines = [line for block in code for line in block.splitlines()]
    found = [re.search(r"(?:^|\s)paracaption ([a-z].*)", line) for line in lines]
    return [shlex.split(each[1].partition(" ;;")[0], comments=True) for each in found if each]


@pytest.fixture(scope="module")
def paracaption():
    return get_command(app)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_of_a_page_exists(page, paracaption):
    for words in commands_of(page):
        command = paracaption
        name, *rest = words
        while name in getattr(command, "commands", {}):
            command = command.commands[name]  # type: ignore[attr-defined]
            name, *rest = rest or [""]
        assert command is not paracaption and command.name in words, words
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, words


@cache
def keys() -> set[str]:
    """The keys of a build's configuration with a dot in them."""
    return {
        f"{name}.{key}"
        for name, field in BuildConfig.model_fields.items()
        if isinstance(field.default, BaseModel)
        for key in type(field.default).model_fields
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_configuration_key_of_a_page_exists(page):
    found = set(
        re.findall(r"`((?:failures|masks|text|limits|io|benchmarks)\.\w+)`", (DOCS / page).read_text())
    )
    assert found <= keys()


def test_the_questions_are_answered_in_one_to_five_sentences_with_a_link():
    sections = (DOCS / "faq.md").read_text().split("\n### ")[1:]
    assert 15 <= len(sections) <= 25
    for section in sections:
        question, _, answer = section.partition("\n\n")
        answer = answer.partition("\n## ")[0]
        assert question.endswith("?") or "?" in question
        assert re.search(r"\]\([\w./#-]+\)", answer), question
        sentences = re.findall(r"[.?](?=\s|$)", re.sub(r"`[^`]*`", "", answer))
        assert 1 <= len(sentences) <= 5, question  # the last one may only say where to read on
