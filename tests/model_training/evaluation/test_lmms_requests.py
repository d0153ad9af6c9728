"""lmms-eval's requests as questions and options of Chat. lmms-eval itself is not needed."""

import logging

import pytest
from PIL import Image

from paracaption.model_training.evaluation import lmms, lmms_requests
from paracaption.model_training.evaluation.lmms_requests import (
    answer_options,
    cut_answer,
    finish_question,
    question_of_messages,
    question_of_text,
    shorten_answer,
    write_prompt,
)
from paracaption.schemas.answering import AnswerOptions
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.harness import Asking

RED, BLUE = (Image.new("RGB", (30, 20), color) for color in ("red", "blue"))
PLAIN = Asking()


def options(kwargs, **asking):
    return answer_options(kwargs, Asking(**asking), "task").model_dump(exclude_unset=True)


def text(words):
    return {"type": "text", "text": words}


def image(pixels):
    return {"type": "image", "url": pixels}


def test_generation_kwargs_are_options_of_an_answer():
    given = {"max_new_tokens": 16, "until": ["ASSISTANT:"], "temperature": 0.5, "top_p": 0.9, "steps": 8}
    found = options(given | {"block_length": 16, "do_sample": True})
    assert found == {
        "max_new_tokens": 16,
        "stop": ["ASSISTANT:"],
        "temperature": 0.5,
        "top_p": 0.9,
        "steps": 8,
        "block_length": 16,
    }


@pytest.mark.parametrize(
    "kwargs",
    [
        {"do_sample": False, "temperature": 0.7, "top_p": 0.9},
        {"temperature": 0, "top_p": 0},  # MathVerse's, which is out of range and without a meaning
        {"temperature": None, "top_p": None, "num_beams": 1, "top_k": None, "repetition_penalty": 1.0},
        {"until": ["\n\n"]},  # what lmms-eval adds where a task says nothing
        {"until": None},
    ],
)
def test_without_sampling_an_answer_is_greedy_and_nothing_ends_it(kwargs):
    assert options(kwargs) == {"temperature": 0.0}


def test_what_the_settings_say_counts_more_than_the_task_and_lengths_are_capped():
    assert options({"max_new_tokens": 16384}, most_new_tokens=256)["max_new_tokens"] == 256
    found = options({"max_new_tokens": 16}, options={"max_new_tokens": 2, "steps": 2, "block_length": 2})
    assert (found["max_new_tokens"], found["steps"], found["block_length"]) == (2, 2, 2)
    assert options({"max_gen_toks": 9})["max_new_tokens"] == 9


@pytest.mark.parametrize("kwargs", [{"num_beams": 4}, {"top_k": 20}, {"repetition_penalty": 1.2}, {"n": 2}])
def test_what_a_diffusion_model_does_not_do_is_refused(kwargs):
    with pytest.raises(ConfigError, match=f"task: generation_kwargs.{next(iter(kwargs))}: "):
        options(kwargs)


def test_a_value_out_of_range_names_the_task():
    with pytest.raises(ConfigError, match="task: generation_kwargs: max_new_tokens"):
        options({"max_new_tokens": 0})


def test_an_unknown_argument_is_reported_once_and_one_without_effect_never(caplog):
    lmms_requests._reported.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            options({"patch_size": 16, "image_aspect_ratio": "original"})
    assert [record.getMessage() for record in caplog.records] == [
        "task: generation_kwargs.patch_size is not known here and has no effect"
    ]


def test_images_of_messages_stand_where_the_messages_have_them():
    content = [text("Look at "), image(RED), text("and "), image(BLUE), text("What <image> differs?")]
    question = question_of_messages([{"role": "user", "content": content}], "here")
    assert question.text == "Look at <image>\nand <image>\nWhat image differs?"
    assert [*question.images] == [RED, BLUE]


def test_earlier_messages_are_turns_and_a_system_message_stands_first():
    messages = [
        {"role": "system", "content": [text("Be brief.")]},
        {"role": "user", "content": [image(RED), text("What is it?")]},
        {"role": "assistant", "content": [text("A fire.")]},
        {"role": "user", "content": "Where?"},
    ]
    question = question_of_messages(messages, "here")
    assert question.turns == [("Be brief.\n<image>\nWhat is it?", "A fire.")]
    assert (question.text, [*question.images]) == ("Where?", [RED])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ([{"role": "assistant", "content": "Hi"}], "the last message is the model's"),
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "video in a message"),
    ],
)
def test_messages_that_cannot_be_asked_are_refused(messages, message):
    with pytest.raises(ConfigError, match=f"^here: .*{message}"):
        question_of_messages(messages, "here")


def test_images_of_a_text_stand_before_it_or_where_it_says_so():
    assert question_of_text("Which?", [RED, BLUE], "here").text == "<image>\n<image>\nWhich?"
    assert question_of_text("<image> or <image>?", [RED, BLUE], "here").text == "<image> or <image>?"
    assert question_of_text("An <image>?", [], "here").text == "An image?"
    with pytest.raises(ConfigError, match="a video or sound"):
        question_of_text("What?", [{"type": "audio"}], "here")


def finished(question, doc, **asking):
    return finish_question(question, doc, Asking(**asking), AnswerOptions(max_new_tokens=2), "here")


def test_a_prompt_is_made_of_lmms_evals_own_and_of_the_document():
    question = question_of_text("Which?\nAnswer.", [RED, BLUE], "here")
    doc = {"question": "Which <image 1>?", "choices": ["a cat", "a dog"]}
    made = finished(
        question, doc, prompt="{{ doc.question }}\n{{ doc.choices | lettered }}", number_images=True
    )
    assert made.text == "Image-1: <image>\nImage-2: <image>\nWhich <image 1>?\nA. a cat\nB. a dog"
    one = question_of_text("Which?\nAnswer.", [RED], "here")
    assert finished(one, doc, prompt="{{ text }}!", number_images=True).text == "<image>\nWhich?\nAnswer.!"
    assert finished(one, doc).text == one.text
    assert finished(one, doc).options == AnswerOptions(max_new_tokens=2)


def test_the_first_image_can_be_enlarged():
    made = finished(question_of_text("Which?", [RED, BLUE], "here"), {}, scale_first_image=2)
    assert [each.size for each in made.images] == [(60, 40), (30, 20)]


@pytest.mark.parametrize("template", ["{{ doc.nothing }}", "{% if %}", "{{ doc.question | lettered(1) }}"])
def test_a_template_that_does_not_fit_names_the_document_and_its_fields(template):
    with pytest.raises(ConfigError, match=r"^task, document 3: asking.prompt: .*the fields are question$"):
        write_prompt(template, "", {"question": "Q"}, "task, document 3")


def test_a_template_cannot_reach_into_python():
    with pytest.raises(ConfigError, match="unsafe"):
        write_prompt("{{ text.__class__.__mro__ }}", "", {}, "here")


@pytest.mark.parametrize(
    ("answer", "short"),
    [
        *[("Yes", "Yes"), ("No.", "No"), ("Yes.", "Yes"), ("No, it is", "No, it is"), ("yes", "yes")],
        *[("B. a dog", "B"), ("B.", "B."), ("B", "B"), ("G. it", "G. it"), ("", "")],
    ],
)
def test_short_answers_are_cut_as_in_the_released_code(answer, short):
    assert shorten_answer(answer) == short


def test_an_answer_ends_at_a_stop_text_even_within_a_token():
    assert cut_answer(" a cat ASSISTANT: no", {"until": ["ASSISTANT:", "\n\n"]}, PLAIN) == "a cat"
    assert cut_answer("a\n\nb", {"until": ["\n\n"]}, PLAIN) == "a\n\nb"
    assert cut_answer("B. a", {}, Asking(short_answer=True)) == "B"


def test_batch_sizes_are_texts():
    assert [lmms.to_batch_size(given) for given in ("4", 3, "auto", "auto:2")] == [4, 3, 8, 8]
    assert lmms.to_batch_size("auto", 2) == 2
    for wrong in ("0", "-1", "many", ""):
        with pytest.raises(ConfigError, match="batch_size"):
            lmms.to_batch_size(wrong)


def test_each_process_of_a_machine_has_its_own_device(monkeypatch):
    import torch

    assert lmms.process_device("auto") == "auto"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert lmms.process_device("cuda:1") == "cuda:1"
    assert lmms.process_device("auto") == ("cuda:3" if torch.cuda.is_available() else "cpu")


def test_a_file_of_settings_that_is_none_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"settings=.*none\.json"):
        lmms.read_settings(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"list.json: model: has to be a text"):
        lmms.read_settings(tmp_path / "list.json")
    (tmp_path / "typo.json").write_text('{"model": "DIR", "asking": {"promt": "x"}}')
    with pytest.raises(ConfigError, match=r"typo.json: asking.promt: unknown key"):
        lmms.read_settings(tmp_path / "typo.json")
