"""Prompts: what is sent is golden, and a change of it without a new version fails here."""

from pathlib import Path

import pytest

from paracaption.pipeline.models import prompts

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "prompts"

FIELDS = {"category": "traffic light", "caption": "A red traffic light {hangs} over the street."}


def rendered(name: str) -> str:
    """Everything that a model sees of a prompt, and what its answer must look like."""
    prompt = prompts.load_prompt(name)
    messages = prompt.messages(**{field: FIELDS[field] for field in prompts.field_names(prompt)})
    parts = [f"<{message['role']}>\n{message['content']}\n" for message in messages]
    return (
        "".join(parts)
        + f"<answer>\n{prompt.choices or prompt.pattern or 'text'}, {prompt.max_tokens} tokens\n"
    )


@pytest.mark.parametrize("name", prompts.NAMES)
def test_a_prompt_is_that_of_its_version(name):
    """Mend by raising `version` in the YAML and adding the golden file of the new one."""
    golden = GOLDEN / f"{name}-{prompts.load_prompt(name).version}.txt"
    assert golden.is_file(), f"add {golden} with:\n{rendered(name)}"
    assert rendered(name) == golden.read_text(encoding="utf-8"), f"{name} changed: raise its version"


def test_every_golden_file_belongs_to_a_prompt():
    names = {path.stem.rpartition("-")[0] for path in GOLDEN.iterdir()}
    assert names == set(prompts.NAMES)


def test_what_differs_between_questions_comes_last():
    one, other = (
        prompts.load_prompt("verify_category").messages(category="dog", caption=caption)
        for caption in ("A brown dog.", "A black cat.")
    )
    assert one[0] == other[0]
    assert one[1]["content"].endswith("A brown dog.") and one[1]["content"][:-12] == other[1]["content"][:-12]


@pytest.mark.parametrize(
    ("name", "answer", "accepted"),
    [
        ("verify_category", "yes", True),
        ("verify_category", "no", True),
        ("verify_category", "Yes", False),
        ("verify_category", "yes.", False),
        ("verify_category", "", False),
        ("extract_category", "dog", True),
        ("extract_category", "traffic light", True),
        ("extract_category", "t-shirt", True),
        ("extract_category", "none", True),
        ("extract_category", "a b c d e", False),
        ("extract_category", "Dog", False),
        ("extract_category", "dog\n", False),
        ("extract_category", "dog, cat", False),
        ("describe_region", "A dog.", True),
        ("describe_region", "  ", False),
    ],
)
def test_answers_are_held_against_the_schema(name, answer, accepted):
    assert prompts.load_prompt(name).accepts(answer) is accepted


def test_the_longest_category_fits_its_tokens_and_the_filter():
    """One byte may be one token: nothing that matches is cut short, or called no phrase by the filter."""
    from paracaption.filters.category import core_category

    prompt = prompts.load_prompt("extract_category")
    longest = " ".join(["a" * 19] * 4)
    assert prompt.accepts(longest) and not prompt.accepts(longest + "a")
    assert len(longest) + 1 <= prompt.max_tokens and core_category(longest)[0] == longest


def test_the_digest_covers_text_version_and_schema():
    text = "version: 1\nsystem: S\nuser: 'U {caption}'\nanswer: {choice: ['yes', 'no']}\nmax_tokens: 8\n"
    changed = [
        text.replace("version: 1", "version: 2"),
        text.replace("system: S", "system: T"),
        text.replace("U {", "V {"),
        text.replace("'no'", "'nay'"),
        text.replace("8", "9"),
    ]
    digests = {prompts.parse_prompt("x", each).digest for each in [text, *changed]}
    assert len(digests) == 1 + len(changed)


def test_choices_that_begin_each_other_are_refused():
    text = "version: 1\nsystem: S\nuser: U\nanswer: {choice: ['no', 'not sure']}\nmax_tokens: 8\n"
    with pytest.raises(ValueError, match="begins another"):
        prompts.parse_prompt("x", text)


def test_an_unknown_key_is_refused():
    text = "version: 1\nsystem: S\nuser: U\nanswer: text\nmax_tokens: 8\ntemprature: 1\n"
    with pytest.raises(ValueError, match="temprature"):
        prompts.parse_prompt("x", text)
