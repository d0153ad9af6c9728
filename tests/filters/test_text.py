from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paracaption.filters import text
from paracaption.schemas.config import Text
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import SCORES
from tests.shared_data import shared_data

NATURAL = [
    "A red apple with a stem.",
    "A dog on a mat, asleep.",
    "A black, curved earphone with a smooth, glossy finish.",
    "A blue circle with a white border, a red circle with a white border, and a green one with a white rim.",
    "Two bowls: the left bowl is white with a blue rim, the right bowl is blue with a white rim.",
    "The bicycle on the left has a visible rear wheel and part of the frame, while the bicycle on the right "
    "has a visible front wheel and part of the frame.",
    "An armoured vehicle, the tank. The tank has tracks, a turret and a long gun.",
    "A yellow tag with the text \"£4.50\" in red and 'New York New York' below it.",
    "A comic panel with a speech bubble that reads \"I'm sorry, I can't help you with that image.\"",
    "The sign reads: Friday, Sep 2, 2022, 61°F, and below it Saturday, 58°F.",
    "A woman in a red dress, white shoes and a hat, with a bag, a phone, a book, an umbrella and a scarf.",
    "A wall clock with the numbers 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 12 in black on a white face.",
    "A very, very, very old tree with a thick, gnarled trunk...",
    "Ein brauner Hund liegt auf einer grünen Wiese und schläft.",
    "一只棕色的狗躺在绿色的草地上、旁边有一个红色的球。",
    "एक भूरा कुत्ता हरी घास पर लेटा हुआ है।",
    "Коричневая собака лежит на зелёной траве.",
    "كلب بني يستلقي على العشب الأخضر في الحديقة",
    "A house whose roof is red, of which one can say that that is what it is.",
]


@pytest.mark.parametrize("caption", NATURAL)
def test_natural_captions_are_kept(caption):
    assert text.clean(caption, Text()).keep, text.clean(caption, Text())


DROPPED = {
    Reason.TEXT_TOO_SHORT: ["", " \n\t ", "About us", "A dog.", "a b c d e"],
    Reason.TEXT_JUNK: [
        "A dog lies on the green grass.<|im_end|>",
        "<|mdm_mask|><|mdm_mask|> dog <|mdm_mask|> grass <|mdm_mask|>",
        "A dog lies on the green grass.</s>",
        "<p>A dog lies on the green grass.</p>",
        "**A dog** lies on the green grass.",
        "```A dog lies on the green grass.```",
        "A d\ufffdg lies on the gr\ufffden grass.",
        "A dog lies on\x00 the green grass.",
        "A cafÃ© with a green awning and a door.",
        '{"caption": "A dog lies on the green grass."}',
        "[0.12, 0.55, 0.31, 0.98] is where the dog lies.",
        "def caption(image): return the dog on the grass",
        "iVBORw0KGgoAAAANSUhEUgAAAAUAAAAFCAYAAACNbyblAAAAHElEQVQI12P4 is a dog on grass",
        "1 2 3 4 5 6 7 8 9 10 11 12 dogs",
        "!!! ??? *** ### --- a dog on the grass",
        "A dogggggggggggggg lies on the grass.",
        "ASSISTANT: A dog lies on the green grass.",
        "\ud800 A dog lies on the green grass.",
    ],
    Reason.TEXT_REFUSAL: [
        "I'm sorry, but I can't describe this region.",
        "I\u2019m sorry, I cannot help with that.",
        "As an AI language model, I do not see images.",
        "As a large language model I have no eyes for this dog.",
        "Unfortunately, the mask covers no dog.",
        "I am unable to identify the object in the region.",
        "It is not possible to determine what this is.",
        "The image is too blurry to provide a detailed description of the object.",
        "No image was provided with the question.",
        "Please provide a clearer photo of the dog.",
        '"I\'m sorry, I cannot help with that."',
    ],
    Reason.TEXT_BOILERPLATE: [
        "The image shows an object.",
        "This is a picture of a dog.",
        "There is something visible in the center of the image.",
        "Sure! A dog lies on the green grass.",
        "Here is a detailed description of the region: a dog on grass.",
    ],
    Reason.TEXT_REPEATS: [
        "a man with a hat on top of a hat on top of a hat on top of a hat on",
        "A dog on grass, dog, dog, dog, DOG.",
        "red red red red red red red red red red red",
        "A brown dog lies on the grass. It has a red collar. A brown dog lies on the grass.",
        "The dog, which is brown, lies on the lawn. It sleeps. The dog, which is brown, lies on",
        "A cat sitting on a cat sitting on a cat in the yard of a house.",
        "The the dog lies on the green grass.",
        "First,, a brown dog lies on the green grass.",
        "A brown dog lies on grass grass near a house house.",
        "A brown dog lies on the lawn.. It sleeps.",
        "狗在草地上狗在草地上狗在草地上狗在草地上狗在草",
        "The long red banner across the top of the page says that all visitors are welcome to come in. "
        "Below, the long red banner across the top of the page says that all visitors are welcome once more.",
    ],
    Reason.TEXT_ENUMERATES: [
        "A shelf with a book, a bag, a hat, a pen, a cup, a ring, a shoe, a lamp, a coat, a belt, a fan, "
        "a key, a jar, a box, a mug, a pin, a card",
        "A shelf with a book and a bag and a hat and a pen and a cup and a ring and a shoe and a lamp "
        "and a coat and a belt and a fan and a key and a jar and a box and a mug and a pin and a card",
        " ".join(
            f"There is a {word}."
            for word in "book bag hat pen cup ring shoe lamp coat belt fan key jar box mug pin card".split()
        ),
        "A page. " + " ".join(f"The {word} line says {word * 2}." for word in text._UNITS.split()),
        "A page whose rows begin with " + " then ".join(f"{n}. {chr(96 + n)}x" for n in range(1, 20)),
    ],
    Reason.TEXT_TOO_LONG: [
        " ".join(f"{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(170)),
        " ".join(f"{chr(97 + n % 26)}{chr(65 + n // 26)}z" * 5 for n in range(100)),
    ],
}


@pytest.mark.parametrize(("reason", "caption"), [(r, c) for r, captions in DROPPED.items() for c in captions])
def test_bad_captions_are_dropped_for_what_is_wrong_with_them(reason, caption):
    assert text.clean(caption, Text()).reason is reason, text.clean(caption, Text())


def test_every_text_reason_has_a_rule():
    rules = {reason for reason, _ in text.RULES} | {Reason.TEXT_UNSURE}  # which is not about the text
    assert rules == {r for r in Reason if r.startswith("text_")}


def test_a_caption_that_its_captioner_doubts_is_dropped_last():
    doubted = {"config": Text(min_confidence=0.5), "confidence": 0.25}
    found = text.clean(NATURAL[0], **doubted)
    assert (found.reason, found.detail) == (Reason.TEXT_UNSURE, "confidence 0.250, at least 0.5 needed")
    assert text.clean("A dog.", **doubted).reason is Reason.TEXT_TOO_SHORT


@pytest.mark.parametrize(("least", "confidence"), [(None, 0.0), (0.5, 0.5), (0.5, None)])
def test_a_caption_is_kept_without_a_threshold_at_it_and_without_a_confidence(least, confidence):
    assert text.clean(NATURAL[0], Text(min_confidence=least), confidence).keep


def test_scores_are_kept_with_every_verdict():
    for caption in ["", "A dog.", *NATURAL]:
        scores = text.clean(caption, Text()).scores
        assert scores.keys() == {"num_words", "repeat_share"} <= SCORES.keys()


def test_words_and_repeated_share_are_counted_as_in_the_labelled_data():
    caption = "A blue speech bubble with a bolt symbol, and a red speech bubble with a bolt symbol."
    scores = text.clean(caption, Text()).scores
    grams = [tuple(caption.lower().replace(",", "").replace(".", "").split()[i : i + 4]) for i in range(14)]
    assert scores == {"num_words": 17, "repeat_share": (14 - len(set(grams))) / 14}


def test_details_are_short_and_printable():
    for caption in [
        "\ud800" * 500,
        "犬" * 500,
        "I'm sorry " * 500,
        "<|" + "x" * 30 + "|>",
        "\n" * 99 + "<b>",
    ]:
        detail = text.clean(caption, Text()).detail
        assert detail.isprintable() and detail.isascii() and len(detail) < 800


words = st.text(alphabet="abcdefghijklmnopqrstuvwxyz", min_size=2, max_size=7)
phrases = st.lists(words, min_size=2, max_size=40, unique=True)


@given(phrases, st.integers(4, 9), st.data())
def test_a_loop_of_any_period_is_dropped_whatever_its_case_and_punctuation_and_wherever_it_is_cut(
    phrase, times, data
):
    cut = data.draw(st.integers(0, len(phrase) - 1), "words of the last, cut repetition")
    mark = data.draw(st.sampled_from([" ", ", ", ". ", "; ", " - ", "! ", "\n"]), "between repetitions")
    copies = [" ".join(phrase), " ".join(phrase).capitalize(), " ".join(phrase).upper()]
    looped = mark.join([*(copies[n % 3] for n in range(times)), " ".join(phrase[:cut])])
    caption = "A brown dog with a red collar sleeps, " + looped
    assert text.repeats(text.read(caption), Text()) is not None


@given(phrases)
def test_words_that_do_not_repeat_are_never_a_repetition(phrase):
    assert text.repeats(text.read(" ".join(phrase)), Text()) is None


@settings(max_examples=300)
@given(st.text())
def test_any_string_gets_a_verdict(caption):
    verdict = text.clean(caption, Text())
    assert verdict.keep or verdict.detail
    assert verdict == text.clean(caption, Text())


UNITS = {
    "letters": "a",
    "words": "a ",
    "loop": "the dog ran ",
    "marks": "!",
    "dots": ". ",
    "commas": ", a",
    "lines": "\n",
    "quotes": '"',
    "open quotes": "“",
    "tags": "<a ",
    "keys": '{"a',
    "boxes": "[1,",
    "emphasis": "__a_",
    "Han": "犬",
    "almost blobs": "a" * 39 + " ",
    "white space": "a" + " " * 999,
    "almost refusals": "as a b the image too ",
    "brackets": "] ",
    "ordinals": "first twenty ",
    "apostrophes": "a'",
    "no image": "no image ",
}


@pytest.mark.timeout(120)  # four million characters take seconds; what is quadratic takes many minutes
@pytest.mark.parametrize("length", [20_000, pytest.param(4_000_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", UNITS)
def test_an_adversarial_caption_of_any_length_comes_to_an_end(name, length):
    caption = "x" + UNITS[name] * (length // len(UNITS[name])) + "x"
    prose = text.read(caption)
    for _, rule in text.RULES:
        rule(prose, Text())


def test_every_labelled_caption_gets_its_label():
    labelled = json.loads((shared_data("captions") / "repetition_labelled_open.json").read_text())
    judged = {item["source"]: text.clean(item["caption"], Text()) for item in labelled}
    wrong = [item["source"] for item in labelled if judged[item["source"]].keep != (item["label"] == "keep")]
    assert not wrong, {source: judged[source] for source in wrong}
    reasons = {judged[item["source"]].reason for item in labelled if item["label"] == "reject"}
    assert reasons <= {Reason.TEXT_REPEATS, Reason.TEXT_ENUMERATES}


def test_good_captions_of_real_models_are_kept():
    lines = (shared_data("captions") / "region_captions_open.jsonl").read_text().splitlines()
    captions = {record["id"]: record["caption"] for record in map(json.loads, lines)}
    dropped = {id_: text.clean(caption, Text()).reason for id_, caption in captions.items()}
    dropped = {id_: reason for id_, reason in dropped.items() if reason}
    # Read one by one: transcribed interface labels ("About Us"), two loops, one refusal. No good caption.
    assert {id_ for id_, reason in dropped.items() if reason is Reason.TEXT_REPEATS} == {
        "mdvp/gar_1b/250",
        "mdvp/gar_8b/238",
    }
    assert sum(reason is Reason.TEXT_REFUSAL for reason in dropped.values()) == 1
    short = [id_ for id_, reason in dropped.items() if reason is Reason.TEXT_TOO_SHORT]
    assert len(short) + 3 == len(dropped)
    assert all(id_.startswith("mdvp/") and len(captions[id_].split()) < 5 for id_ in short)
