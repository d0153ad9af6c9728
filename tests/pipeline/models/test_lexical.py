"""The lexical judge finds what a caption is about, and whether that is the category."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paracaption.pipeline.models.embedded.lexical import LexicalJudge, core_category, describes
from paracaption.pipeline.models.protocols import Question
from paracaption.pipeline.sources.categories import load_categories
from tests.shared_data import shared_data


@pytest.mark.parametrize(
    ("caption", "core"),
    [
        ("A young man in a red shirt.", "man"),
        ("The ski features a predominantly black surface.", "ski"),
        ("Two bicycles with black tires and silver rims.", "bicycle"),
        ("A piece of sushi with a bed of white rice.", "sushi"),
        ("A close-up of a dog's head.", "dog"),
        ("The visible part of the gazelle shows two horns.", "gazelle"),
        ("A rectangular, white air conditioner unit with a grille.", "air conditioner"),
        ("A black and white cat with a white underbelly is sitting.", "cat"),
        ("A large, industrial crane with a lattice structure.", "crane"),
        ("A person wearing a dark helmet.", "person"),
        ("A pair of scissors with red handles.", "scissors"),
        ("The image shows a cat on a sofa.", "cat"),
        ("There is a large tree behind the house.", "tree"),
        ("In the foreground, a dog runs.", "dog"),
        ("A round orange with a glossy surface.", "orange"),
        ("An elongated green object with a smooth surface.", "object"),
        ("A tall, wall-mounted cabinet filled with books.", "cabinet"),
        ("The spectacles feature a thin frame.", "spectacles"),
        ("A glass bottle, standing upright.", "bottle"),
        ("The buildings are tall.", "building"),
    ],
)
def test_the_core_category_is_the_head_of_the_subject(caption, core):
    assert core_category(caption) == core


@pytest.mark.parametrize(
    "caption",
    ["", "  ", "!!! ???", "一只猫坐在沙发上。", "12345", "Ein Hund sitzt auf dem Rasen.", "the a an"],
)
def test_what_is_not_english_has_no_core_category(caption):
    assert core_category(caption) == ""


@pytest.mark.parametrize(
    ("caption", "category"),
    [
        ("A woman with dark hair, wearing a white shirt.", "person"),
        ("The canoe has a wooden hull.", "boat"),
        ("A slice of apple with a red edge.", "apple"),
        ("The car is a white SUV with a rear hatchback.", "suv"),
        ("A clear glass with a slender stem.", "wine glass"),
        ("A doughnut with a glossy red icing.", "donut"),
        ("The car window is a large glass panel.", "car"),
        ("Black sunglasses.", "glasses"),
        ("A red fire engine with a silver bumper.", "truck"),
        ("A dark brown wicker basket.", "Bakset"),
        ("A brick in red.", "brick wall"),
        ("A tall wardrobe with two doors.", "cabinet/shelf"),
        ("A tall wardrobe with two doors.", "cabinet or shelf"),
        ("A shiny quokka on a rock.", "quokka"),
        ("A picture of a boat in a frame.", "picture/frame"),
    ],
)
def test_synonyms_kinds_and_parts_describe_the_category(caption, category):
    assert describes(caption, category) > 0


@pytest.mark.parametrize(
    ("caption", "category"),
    [
        ("The bus is predominantly blue with a white section.", "truck"),
        ("A dark brown, wooden ladder with flat rungs.", "stool"),
        ("A triangular slice of mango with a smooth flesh.", "potato"),
        ("A hot dog with mustard.", "dog"),
        ("A brown teddy bear.", "bear"),
        ("A bus driver in uniform.", "bus"),
        ("A woman holding an umbrella.", "umbrella"),
        ("A wine glass on a table.", "glasses"),
        ("The leg of the stool is made of wood.", "person"),
        ("", "cat"),
        ("A cat.", ""),
    ],
)
def test_another_subject_does_not_describe_the_category(caption, category):
    assert describes(caption, category) < 0


def test_a_mere_mention_is_a_no_with_a_smaller_margin():
    mentioned, absent = (describes(text, "umbrella") for text in ("A woman with an umbrella.", "A woman."))
    assert absent < mentioned < 0


def test_answers_are_yes_or_no_with_the_margin_of_the_same_sign():
    questions = [Question("verify", "A black cat.", "cat"), Question("verify", "A black cat.", "dog")]
    yes, no = LexicalJudge().ask(questions)
    assert (yes.text, no.text) == ("yes", "no")
    assert yes.margin is not None and no.margin is not None and yes.margin > 0 > no.margin


def test_extraction_answers_in_order_without_margin():
    answers = LexicalJudge().ask([Question("extract", "A black cat."), Question("extract", "")])
    assert [(answer.text, answer.margin) for answer in answers] == [("cat", None), ("", None)]


def test_an_unknown_kind_of_question_is_the_callers_bug():
    with pytest.raises(ValueError, match="count"):
        LexicalJudge().ask([Question("count", "Two cats.")])


def test_every_coco_category_describes_itself_and_is_extracted_as_something():
    for category in load_categories(None).by_id.values():
        assert describes(f"A large {category.name} with a smooth surface.", category.name) == 1.0
        assert core_category(f"A large {category.name} with a smooth surface.")


@given(st.text(max_size=300), st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_gets_an_answer(caption, category):
    verdict, core = LexicalJudge().ask([Question("verify", caption, category), Question("extract", caption)])
    assert verdict.text in {"yes", "no"} and core.text == core.text.strip()


def test_long_texts_take_no_longer_than_their_length_warrants():
    assert core_category("very " * 50_000 + "long") in {"", "long"}
    assert describes("A cat, " * 20_000, "dog") == -1.0


def test_categories_judged_by_people_are_judged_alike():
    rows = [
        json.loads(line)
        for line in shared_data("captions/region_captions_open.jsonl").read_text().splitlines()
    ]
    rows = [row for row in rows if row.get("category_judged_ok") is not None]
    answers = LexicalJudge().ask([Question("verify", row["caption"], row["category"]) for row in rows])
    wrong = [answer.text for answer, row in zip(answers, rows, strict=True) if not row["category_judged_ok"]]
    right = [answer.text for answer, row in zip(answers, rows, strict=True) if row["category_judged_ok"]]
    assert wrong.count("yes") == 0
    assert right.count("no") <= 0.03 * len(right)


def test_its_identity_changes_with_the_synonyms(monkeypatch):
    before = LexicalJudge.identity()
    monkeypatch.setattr("paracaption.pipeline.models.embedded.lexical._table_text", lambda: "cat: moggy")
    assert LexicalJudge.identity()["synonyms"] != before["synonyms"]
    assert set(before) == {"version", "synonyms", "simplemma"}
