"""The decoder's options are declared once, and checked without torch."""

import subprocess
import sys

import pytest

from paracaption.schemas.decoding import DecodeOptions
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.renames import RenamedWarning
from paracaption.schemas.training import Evaluation


@pytest.mark.parametrize(
    "wrong",
    [
        {"strategy": "random"},
        {"cache": "exakt"},
        {"max_new_tokens": 0},
        {"steps": 0},
        {"refresh_every": 0},
        {"redo_below": 1.1},
        {"settled": -0.1},
        {"threshold": 90},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_options_that_make_no_sense_are_errors_that_name_them(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=f"^captioner.options.decode: {name}: .*given: {value!r}"):
        DecodeOptions.checked(wrong, "captioner.options.decode")


def test_the_old_name_of_the_captions_length_still_works():
    for schema, others in ((DecodeOptions, {}), (Evaluation, {"corpus": "corpus"})):
        with pytest.warns(RenamedWarning, match="`length` is now `max_new_tokens`"):
            assert schema.checked({"length": 7, **others}).max_new_tokens == 7


def test_what_is_stored_keeps_the_name_that_it_had_in_release_0_1():
    stored = DecodeOptions(max_new_tokens=7, threshold=0.5).stored()
    assert stored == {
        "strategy": "remask",
        "length": 7,
        "steps": 32,
        "threshold": 0.5,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 0,
        "cache": "auto",
        "refresh_every": 4,
        "compare": False,
        "early_exit": True,
        "suppress_special": None,
    }


def test_newer_options_are_stored_only_where_they_are_used():
    used = {"end_of_text_last": True}
    assert DecodeOptions(**used).stored() == DecodeOptions().stored() | used


def test_options_are_checked_without_torch():
    script = """
import sys
from paracaption.schemas.decoding import DecodeOptions
from paracaption.schemas.errors import ConfigError
try:
    DecodeOptions.checked({"strategy": "best"})
except ConfigError:
    print(*sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
