"""`Chat`: how questions are laid out, what is refused, and what an answer says of itself."""

import numpy as np
import pytest
import torch

from paracaption.model_training.data.conversation_records import Record, Turn
from paracaption.model_training.data.conversations import make_conversation_example
from paracaption.model_training.decoding import blocks
from paracaption.model_training.decoding.answered import AskedAbout, stream
from paracaption.model_training.decoding.chat import Chat, Question
from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.schemas.answering import AnswerOptions
from paracaption.schemas.errors import ConfigError
from tests.model_training.tiny_models import lively, photo
from tests.tiny.perceptiondlm_model import SMALLEST, tiny_model, write_model

SHORT = {"max_new_tokens": 6, "block_length": 3}


@pytest.fixture(scope="module")
def chat():
    return Chat(*tiny_model(**SMALLEST))


def picture(seed):
    return photo(seed, 0)[0]


def text_of(chat, question, **fields):
    """What is asked, with `#` for the tokens of a view and without the slots."""
    asked = chat._lay_out(question, AnswerOptions(**(SHORT | fields)), "")
    ids = np.concatenate([asked.example.prefix[0], asked.example.captions[0, : asked.first]])
    view = "<IMG_CONTEXT>" * chat.model.config.tokens_per_tile
    return chat.processor.tokenizer.decode(ids).replace(view, "#")


def test_a_question_stands_as_in_training(chat):
    from PIL import Image

    shown = [picture(0), picture(1)]
    said = ["<image> or <image>?", "a cat", "why?", "it is small", "sure?", "yes"]
    speakers = ["human", "gpt"] * 3
    turns = [Turn(*pair) for pair in zip(speakers, said, strict=True)]
    trained, label = make_conversation_example(
        Record(turns), [Image.fromarray(each) for each in shown], chat.processor, "a"
    )
    question = Question(said[4], shown, [(said[0], said[1]), (said[2], said[3])])
    asked = chat._lay_out(question, AnswerOptions(**SHORT), "")
    np.testing.assert_array_equal(asked.example.prefix, trained.prefix)
    before = trained.captions.shape[1] - len(chat.processor.tokenize("yes")) - 1
    assert asked.first == before and label[before:].all() and not label[before - 1]
    np.testing.assert_array_equal(asked.example.captions[:, :before], trained.captions[:, :before])
    np.testing.assert_array_equal(asked.example.views, trained.views)
    assert asked.example.grids == trained.grids


def test_images_stand_first_each_on_a_line_unless_the_question_says_where(chat):
    assert "user<|end_header_id|>\n<img>#</img>\nwhat?<|eot_id|>" in text_of(
        chat, Question("what?", [picture(0)])
    )
    both = text_of(chat, Question("what?", [picture(0), picture(0)]))
    assert "\n<img>#</img>\n<img>#</img>\nwhat?" in both
    placed = text_of(chat, Question("Is <image> like <image>?", [picture(0), picture(0)]))
    assert "Is <img>#</img> like <img>#</img>?" in placed
    turn = text_of(chat, Question("and this: <image>?", [picture(0)], [("hello", "hi")]))
    assert turn.endswith(
        "hi<|eot_id|>\n<|start_header_id|>user<|end_header_id|>\nand this: <img>#</img>?"
        "<|eot_id|>\n<|start_header_id|>assistant<|end_header_id|>\n"
    )


def test_the_template_is_a_choice_and_follows_the_layout(chat):
    question = Question("and why?", turns=[("hello", "hi")])
    released = (
        "<|start_header_id|>user<|end_header_id|>\nhello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n"
        "hi<|eot_id|><|start_header_id|>user<|end_header_id|>\nand why?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n"
    )
    assert text_of(chat, question, template="released") == released
    assert text_of(chat, question).startswith("<|start_header_id|>system<|end_header_id|>\nYou are")
    reference = Chat(*tiny_model(layout="reference", **SMALLEST))
    assert text_of(reference, question) == released
    assert text_of(reference, question, template="trained") == text_of(chat, question)


def test_a_question_about_a_region_is_answered_as_the_captioner_does(chat):
    captioner = RegionCaptioner(chat.model, chat.processor)
    for seed in range(4):
        pixels, [mask] = photo(seed, 1)
        answer = chat.ask(
            "name it", pixels, region=mask, max_new_tokens=6, block_length=6, suppress_special=False
        )
        caption = captioner.caption(
            pixels,
            [mask],
            prompt="name it",
            strategy="per-region",
            max_new_tokens=6,
            steps=6,
            suppress_special=False,
        )
        assert [answer] == caption


@pytest.mark.parametrize("said", ["", " cat" * 300], ids=["none", "over 1,024 tokens"])
def test_an_answer_of_a_turn_may_be_empty_or_long_as_a_models_may(chat, said):
    turn = text_of(chat, Question("and why", turns=[("what", said)]))
    assert f"assistant<|end_header_id|>\n{said}<|eot_id|>" in turn


def test_many_questions_are_answered_in_their_order_whatever_the_batches(chat):
    questions = [Question(f"what {number}", [picture(number)]) for number in range(5)]
    questions[2] = Question("say", options=AnswerOptions(max_new_tokens=4, temperature=1.0))
    alone = [chat.ask_all([each], **SHORT)[0] for each in questions]
    for batch_size in (2, 8):
        together = chat.ask_all(iter(questions), batch_size=batch_size, **SHORT)
        assert [(each.text, each.tokens, each.forwards) for each in together] == [
            (each.text, each.tokens, each.forwards) for each in alone
        ]
    assert len(alone[2].tokens) <= 4


def test_memory_that_runs_out_halves_the_batch_of_questions_and_changes_no_answer(chat, monkeypatch):
    questions = [Question(f"what {number}", [picture(number)]) for number in range(5)]
    expected = [each.tokens for each in chat.ask_all(questions, **SHORT)]
    real, sizes = blocks.answer_batch, []

    def short_of_memory(model, asked):
        sizes.append(len(asked))
        if len(asked) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, asked)

    monkeypatch.setattr(blocks, "answer_batch", short_of_memory)
    assert [each.tokens for each in chat.ask_all(questions, batch_size=4, **SHORT)] == expected
    assert sizes == [4, 2, 2, 1]


def test_an_answer_says_how_it_ended_and_how_sure_it_is(chat):
    [whole] = chat.ask_all([Question("say", [picture(1)])], max_new_tokens=6, early_exit=False)
    words = [chat.processor.tokenizer.decode([token]) for token in whole.tokens]
    assert whole.ended in ("length", "end") and 0 < whole.confidence <= 1
    assert whole.text == "".join(words).strip()
    by_one = chat._lay_out(Question("say", [picture(1)]), AnswerOptions(max_new_tokens=6, block_length=1), "")
    first = chat._answer([(0, by_one)])[0].tokens[0]
    nothing = chat._answer([(0, by_one._replace(stops=((first,),)))])[0]
    assert (nothing.text, nothing.tokens, nothing.ended, nothing.forwards) == ("", [], "stop", 1)


def test_the_share_of_tokens_that_an_approximate_cache_keeps_is_measured():
    chat, fields = Chat(*lively(layout="reference")), {"max_new_tokens": 12, "block_length": 6}
    questions = [Question("what is it", [picture(seed)]) for seed in range(3)]
    exact = [each.tokens for each in chat.ask_all(questions, cache="none", **fields)]
    for every in (1, 4):
        answers = chat.ask_all(questions, cache="approximate", refresh_every=every, compare=True, **fields)
        shares = [
            sum(map(int.__eq__, each.tokens, tokens)) / max(len(each.tokens), len(tokens))
            for each, tokens in zip(answers, exact, strict=True)
        ]
        assert [each.agreement for each in answers] == shares
        assert all(share == 1 for share in shares) if every == 1 else 0 < min(shares) < 1
    assert chat.ask_all(questions[:1], **SHORT)[0].agreement is None


def test_steps_show_the_answer_until_it_is_the_answer(chat):
    question = Question("what is it", [picture(2)])
    steps = list(chat.ask_steps(question, **SHORT))
    assert steps[0].text == "" and not steps[0].done and steps[-1].done
    assert [step.forwards for step in steps] == list(range(len(steps)))
    assert all(steps[-1].text.startswith(step.settled) for step in steps)
    [answer] = chat.ask_all([question], **SHORT)
    assert (steps[-1].text, steps[-1].forwards) == (answer.text, answer.forwards)
    assert all(slot.text is None for slot in steps[0].slots)


def test_the_beginning_of_a_stop_string_is_not_settled(chat):
    options = AnswerOptions(max_new_tokens=8, block_length=1)
    asked = chat._lay_out(Question("say", [picture(3)]), options, "")
    answer = chat._answer([(0, asked)])[0]
    assert answer.text.startswith("coat coat dark beside")
    steps = list(chat._shown(asked._replace(stops=(tuple(answer.tokens[1:4]), (7,) * 9))))
    assert [step.settled for step in steps] == ["", "", "coat", "coat", "coat"]
    assert steps[-1].text == "coat"


def test_a_stream_shows_all_of_an_answer_that_ends_within_a_letter():
    chat, ends = Chat(*lively()), set()
    for seed in range(6):
        parts, question = [], Question("what", [picture(seed)])
        options = AnswerOptions(max_new_tokens=8, block_length=2)
        answer = stream(chat, AskedAbout(question, []), options, parts.append)
        assert "".join(parts) == answer == chat.ask_all([question], options)[0].text
        ends.add(answer.endswith("\ufffd"))
    assert ends == {True, False}


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question(" ", [picture(0)]), "a blank text"),
        (Question("a <|eot_id|>"), "a token of the model's own"),
        (Question("<image>?"), "0 images, but <image> stands 1 times"),
        (Question("<image>", [picture(0)] * 2), "2 images, but <image> stands 1 times"),
        (Question("what", ["nowhere.png"]), "image 0"),
        (Question("what", [picture(0)] * 2, region=[0, 0, 5, 5]), "a question about a region has one image"),
        (Question("what", [picture(0)], region=[0, 0, 500, 5]), "mask 0|region 0|box"),
        (Question("what " * 900), "shorten it"),
        (Question("why", turns=[("what", "a <|eot_id|>")]), "an answer in `turns`: it holds '<|eot_id|>'"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_its_number(chat, question, message):
    with pytest.raises(ConfigError, match=message) as error:
        chat.ask_all([Question("fine"), question], **SHORT)
    assert str(error.value).startswith("question 1: ")


def test_steps_take_options_from_the_question_or_from_the_call_not_from_both(chat):
    question = Question("what", options=AnswerOptions(**SHORT))
    for more in ({"options": AnswerOptions()}, {"max_new_tokens": 4}, {"unknown": 4}):
        with pytest.raises(ConfigError, match="the question has options of its own"):
            chat.ask_steps(question, **more)
    assert len(next(iter(chat.ask_steps(question))).slots) == SHORT["max_new_tokens"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 7, "max_new_tokens": 8, "block_length": 4}, "7 for 2 blocks of 4 tokens; give a multiple"),
        ({"stop": [""]}, "an empty text ends every answer"),
        ({"strategy": "remask"}, "strategy"),
        ({"block_size": 4}, "did you mean `block_length`|unknown key"),
        ({"max_new_tokens": True}, "not true or false"),
    ],
)
def test_options_that_cannot_be_are_refused(chat, fields, message):
    with pytest.raises(ConfigError, match=message):
        chat.ask("what", **fields)


def test_a_saved_model_is_opened(tmp_path):
    write_model(tmp_path / "model", **SMALLEST)
    chat = Chat.load(tmp_path / "model", "cpu")
    assert chat.ask("what", picture(0), **SHORT) == chat.ask("what", [picture(0)], **SHORT)
    assert chat.about()["layout"] == "corrected"
