"""What `paracaption evaluate` says beside its table."""

from paracaption.flows.cli.evaluate import notes

JUDGED = {"benchmark": "dlc", "questions": 8, "quality": {"empty": 0.0}, "prompt": None, "grouping": None}


def test_it_says_how_a_model_was_asked_how_much_it_left_empty_and_why_there_are_no_scores():
    asked = {"prompt": "Describe the masked region in detail.", "grouping": "published"}
    told = list(notes(JUDGED | asked | {"questions": 0, "quality": {"empty": 0.25}}))
    assert told[0] == "dlc: asked 'Describe the masked region in detail.', grouping published"
    assert told[1] == "dlc: 25.0% of the captions are empty"
    assert "no scores" in told[2] and "`judge`" in told[2]


def test_a_judged_captioner_that_has_no_prompt_needs_no_note():
    assert list(notes(JUDGED)) == []
