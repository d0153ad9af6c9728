"""Old names work until the version that the table names, and a warning says the new one."""

import importlib.metadata

import pytest
from packaging.version import Version

from paracaption.schemas import renames
from paracaption.schemas.config import Sa1bSource


def test_an_old_key_is_translated_with_a_warning_that_says_the_new_one():
    with pytest.warns(renames.RenamedWarning, match="`licence` is now `license`"):
        source = Sa1bSource.model_validate({"paths": ["a.tar"], "licence": "CC0"})
    assert source.license == "CC0"


def test_both_names_at_once_are_an_error():
    with pytest.raises(ValueError, match="both given; keep `license`"):
        Sa1bSource.model_validate({"paths": [], "licence": "a", "license": "b"})


@pytest.mark.parametrize("each", renames.RENAMED, ids=lambda each: f"{each.where}.{each.old}")
def test_an_old_name_goes_in_its_version(each):
    assert Version(importlib.metadata.version("paracaption")) < Version(each.until), (
        f"remove {each.old} from schemas/renames.py: this version does not know it any more"
    )
