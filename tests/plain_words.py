"""Looks for the words of tests/words.txt in what people read: docs, pages, messages, docstrings, comments.

`python -m tests.plain_words [FILE ...]` prints each place with what to say instead.
Its exit code is 1 if there is any. A line with `plain: ok` in a comment is left alone: words that are data.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("schemas", "filters", "pipeline", "flows", "model_training", "paracaption")
PAGES = (*FOLDERS, "docs", "configs", ":(glob)*.md", "samples/README.md", "Makefile")
ENDINGS = {".py", ".md", ".html", ".yaml", ""}
ALLOWED = "plain: ok"
DATA = (  # words of captions, prompts and toy scenes, which enter digests or files; names of CSS classes
    *("pipeline/models/prompts/", "pipeline/models/embedded/phrases.py", "model_training/toy/"),
    *("pipeline/models/embedded/appearance.py", "pipeline/models/embedded/classical.py"),
    "model_training/decoding/trace_page.py",
)


class Word(NamedTuple):
    """A word to avoid, and what to say instead."""

    pattern: re.Pattern[str]
    instead: str


class Place(NamedTuple):
    """Where a word to avoid is."""

    path: Path
    line: int
    found: str
    instead: str


def read_words(path: Path = ROOT / "tests" / "words.txt") -> list[Word]:
    """The list of words. A line that is no `pattern = advice` is an error."""
    words = []
    for line in path.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern, separator, instead = line.partition(" = ")
        if not separator:
            raise ValueError(f"{path.name}: {line!r} is no `pattern = what to say`")
        words.append(Word(re.compile(rf"\b(?:{pattern.strip()})\b"), instead.strip()))
    return words


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of each line of a file that people read as sentences."""
    text = path.read_text()
    if path.suffix == ".py":
        yield from _python_prose(text)
    elif path.suffix == ".md":
        yield from _markdown_prose(text)
    elif path.suffix == ".html":
        code = re.compile(r"{%.*?%}|{{.*?}}")
        yield from ((number, code.sub("", line)) for number, line in enumerate(text.splitlines(), 1))
    else:
        yield from enumerate(text.splitlines(), 1)


def _python_prose(text: str) -> Iterator[tuple[int, str]]:
    """Comments, and strings that have a space: docstrings and messages."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            for offset, line in enumerate(node.value.split("\n")):
                yield node.lineno + offset, re.sub(r"`[^`]*`", "", line)


def _markdown_prose(text: str) -> Iterator[tuple[int, str]]:
    """Everything but blocks of code and `code`."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, re.sub(r"`[^`]*`", "", line)


def find_words(path: Path, words: list[Word]) -> list[Place]:
    """The places of a file where one of the words stands."""
    lines = path.read_text().splitlines()
    return [
        Place(path, number, match.group(), word.instead)
        for number, text in prose(path)
        for word in words
        if (match := word.pattern.search(text)) and ALLOWED not in lines[min(number, len(lines)) - 1]
    ]


def _files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *PAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    kept = [path for path in paths if not path.relative_to(ROOT).as_posix().startswith(DATA)]
    return [path for path in kept if path.suffix in ENDINGS and path.is_file() and not path.is_symlink()]


def main(names: list[str]) -> int:
    """Print what is found; 1 if there is anything."""
    words = read_words()
    paths = [Path(name).resolve() for name in names] or _files()
    places = [place for path in paths for place in find_words(path, words)]
    for place in sorted(places):
        name = place.path.relative_to(ROOT) if place.path.is_relative_to(ROOT) else place.path
        sys.stdout.write(f"{name}:{place.line}: {place.found!r}: say {place.instead}\n")
    return 1 if places else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
