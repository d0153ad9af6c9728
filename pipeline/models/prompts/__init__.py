"""The prompts: one YAML file each. Whoever changes one raises its version; the digest covers all of it.

What every question shares comes first (the system text) and what differs comes last, so that an engine's
prefix cache holds the instructions once.
"""

from __future__ import annotations

import functools
import hashlib
import re
import string
from collections.abc import Iterable
from importlib import resources
from typing import Any, NamedTuple

import yaml

NAMES = ("verify_category", "extract_category", "describe_region")


class Prompt(NamedTuple):
    """A prompt and how its answer looks.

    Attributes:
        name, version: which one.
        system: the instructions, the same for every question.
        user: template of the question, with its fields in braces.
        choices: the only possible answers; empty if it is not a choice.
        pattern: regular expression that the whole answer matches; "" if it is not one.
        max_tokens: of the answer.
        digest: 16 hex digits of all of the above.
    """

    name: str
    version: int
    system: str
    user: str
    choices: tuple[str, ...]
    pattern: str
    max_tokens: int
    digest: str

    def messages(self, **fields: str) -> list[dict[str, str]]:
        """The chat messages of one question."""
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": self.user.format(**fields)},
        ]

    def accepts(self, answer: str) -> bool:
        """Whether an answer is one of the choices, matches the pattern, or is text at all."""
        if self.choices:
            return answer in self.choices
        if self.pattern:
            return re.fullmatch(self.pattern, answer) is not None
        return bool(answer.strip())

    def schema(self) -> dict[str, Any]:
        """JSON schema of `{"answer": ...}`, for servers that constrain their answers by one."""
        answer: dict[str, Any] = {"type": "string"}
        if self.choices:
            answer["enum"] = list(self.choices)
        elif self.pattern:
            answer["pattern"] = f"^{self.pattern}$"
        return {
            "type": "object",
            "properties": {"answer": answer},
            "required": ["answer"],
            "additionalProperties": False,
        }


@functools.cache
def load_prompt(name: str) -> Prompt:
    """One of `NAMES`."""
    text = resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return parse_prompt(name, text)


def parse_prompt(name: str, text: str) -> Prompt:
    """A prompt from its YAML.

    Raises:
        ValueError: a missing or unknown key, or choices that cannot be told apart: a bug of ours.
    """
    raw = yaml.safe_load(text)
    keys = {"version", "system", "user", "answer", "max_tokens"}
    if set(raw) != keys:
        raise ValueError(f"{name}.yaml: expected the keys {sorted(keys)}, found {sorted(raw)}")
    answer = raw["answer"] if isinstance(raw["answer"], dict) else {}
    choices, pattern = tuple(answer.get("choice", ())), answer.get("pattern", "")
    if any(a != b and b.startswith(a) for a in choices for b in choices):
        raise ValueError(
            f"{name}.yaml: one of the choices {choices} begins another: their ends decide nothing"
        )
    system, user = raw["system"].strip(), raw["user"].strip()
    return Prompt(
        name=name,
        version=raw["version"],
        system=system,
        user=user,
        choices=choices,
        pattern=pattern,
        max_tokens=raw["max_tokens"],
        digest=_digest(raw["version"], system, user, choices, pattern, raw["max_tokens"]),
    )


def field_names(prompt: Prompt) -> set[str]:
    """Names of the template's fields."""
    return {name for _, name, _, _ in string.Formatter().parse(prompt.user) if name}


def prompts_identity(names: Iterable[str]) -> dict[str, str]:
    """What the evidence digest has of these prompts."""
    return {f"prompt:{name}": f"{load_prompt(name).version}-{load_prompt(name).digest}" for name in names}


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
