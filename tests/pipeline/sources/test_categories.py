"""Category lists: names in plain words, and lists that cannot be meant."""

import json

import pytest

from paracaption.pipeline.sources.categories import load_categories, make_table, plain_name
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.reasons import Reason
from tests.pipeline.sources.release import (
    reasons,
)


def test_a_category_may_be_named_instead_of_numbered(release):
    (image,) = release.add(segments=[{"id": 7, "category_name": "Wall-Brick"}]).read()
    assert (image.regions[0].category, image.regions[0].category_id) == ("brick wall", 171)


def test_a_category_whose_name_is_not_utf8_is_unknown(release):
    names = json.dumps([{"id": 1, "name": "caf\ud800"}, {"id": 184, "name": "tree-merged"}])
    (release.root / "names.json").write_text(names)
    (image,) = release.add().read(categories=str(release.root / "names.json"))
    assert reasons(image) == [Reason.UNKNOWN_CATEGORY, None]


def test_category_names_are_plain_words():
    spoken = {
        "tree-merged": "tree",
        "door-stuff": "door",
        "floor-other-merged": "floor",
        "wall-brick": "brick wall",
        "wall-other-merged": "wall",
        "water-other": "water",
        "playingfield": "playing field",
        "Cabinet/shelf": "cabinet or shelf",
        "Street Lights": "street lights",
        "Bakset": "basket",
        "hot dog": "hot dog",
    }
    assert {name: plain_name(name) for name in spoken} == spoken
    names = [category.name for category in load_categories(None).by_id.values()]
    assert len(names) == 133 and not any("-" in name or "merged" in name for name in names)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"id": True, "name": "person"}], "category 0"),
        ([{"id": 1, "name": "person"}, {"id": 1, "name": "bicycle"}], "'person' and 'bicycle'"),
        ([{"id": 1, "name": ""}], "the name ''"),
        ([{"id": 1, "name": "-merged"}], "the name '-merged'"),
        ([{"id": 1, "name": "person", "isthing": "yes"}], "isthing"),
        ([{"id": 1, "name": "person", "isthing": [1]}], "isthing"),
    ],
)
def test_a_category_list_that_cannot_be_meant_is_one_line(rows, words):
    with pytest.raises(ConfigError, match=words) as caught:
        make_table(rows, "names.json")
    assert str(caught.value).startswith("names.json: ") and "\n" not in str(caught.value)


def test_a_category_may_be_repeated_as_it_is_and_isthing_may_be_text():
    row = {"id": 1.0, "name": "wall-brick", "isthing": "0"}
    (category,) = make_table([row, row], "x").by_id.values()
    assert (category.id, category.name, category.is_thing) == (1, "brick wall", False)


def test_a_category_that_is_a_thing_and_stuff_is_told_so():
    rows = [{"id": 1, "name": "person", "isthing": 1}, {"id": 1, "name": "person", "isthing": 0}]
    with pytest.raises(ConfigError, match="'person' with isthing 1 and 0"):
        make_table(rows, "c.json")
