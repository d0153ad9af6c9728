"""Chat answers what PerceptionDLM-Base answers in the released code, to the last token."""

import json
from pathlib import Path

import numpy as np
import pytest

from paracaption.model_training.convert.published import convert
from paracaption.model_training.decoding.blocks import answer_steps
from paracaption.model_training.decoding.chat import Chat, Question
from paracaption.schemas.answering import AnswerOptions
from tests.model_training.base import tiny_base
from tests.model_training.base.cases import CASES

RECORDED = json.loads(Path(__file__).with_name("answers.json").read_text())


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    convert(tiny_base.write_checkpoint(folder / "published"), folder / "model")
    return Chat.load(folder / "model", "cpu", "float32")


def question(name, **changes):
    case = CASES[name]
    given = {
        "max_new_tokens": case.length,
        "steps": case.steps,
        "block_length": case.block,
        "stop": list(case.stop),
        "early_exit": False,
    }
    options = AnswerOptions(**(given | changes))
    return Question(
        case.question, [tiny_base.photo(*each) for each in case.photos], case.turns, options=options
    )


def laid_out(chat, name, **changes):
    asked = question(name, **changes)
    return chat._lay_out(asked, asked.options, "")


def test_every_case_is_recorded_and_was_decided_clearly():
    assert list(RECORDED) == list(CASES)
    assert min(found["gap"] for found in RECORDED.values()) > 1e-4


@pytest.fixture(scope="module")
def states(chat):
    """Between all steps, of all cases in one batch."""
    return list(answer_steps(chat.model, [laid_out(chat, name) for name in CASES]))


def same(states, row, recorded):
    """Check an answer, and when each of its tokens was written."""
    last, length = states[-1], len(recorded["tokens"])
    assert last.tokens_BS[row, :length].tolist() == recorded["tokens"]
    assert int(last.ends_B[row]) == length
    opens = np.stack([state.open_BS[row, :length] for state in states])
    assert opens.sum(0).tolist() == recorded["steps"]
    np.testing.assert_allclose(last.confidence_BS[row, :length], recorded["confidences"], atol=2e-5)
    assert int(last.forwards_B[row]) == recorded["forwards"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.soak
def test_prompts_are_the_same(chat, name):
    asked = laid_out(chat, name)
    ids = np.concatenate([asked.example.prefix, asked.example.captions], axis=1)[0]
    start = asked.example.prefix.shape[1] + asked.first
    assert ids[:start].tolist() == RECORDED[name]["prompt"]
    assert set(ids[start:]) == {tiny_base.MASK}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.soak
def test_answers_are_the_same_to_the_last_token_in_every_step(states, name):
    same(states, list(CASES).index(name), RECORDED[name])


@pytest.mark.parametrize("name", ["two images", "third turn", "text alone by blocks", "two stop strings"])
def test_answers_are_the_same_alone(chat, name):
    same(list(answer_steps(chat.model, [laid_out(chat, name)])), 0, RECORDED[name])


@pytest.mark.soak
def test_texts_are_the_same_when_decoding_stops_early(chat):
    answers = chat.ask_all([question(name, early_exit=True) for name in CASES], batch_size=len(CASES))
    assert [answer.text for answer in answers] == [RECORDED[name]["answer"] for name in CASES]
    fewer = [each.forwards < RECORDED[name]["forwards"] for name, each in zip(CASES, answers, strict=True)]
    assert any(fewer)
    assert {answer.ended for answer in answers} == {"end", "stop", "length"}


@pytest.mark.soak
def test_without_the_tokens_that_are_never_predicted_answers_would_be_others(chat):
    free = chat.ask_all([question(name, suppress_special=False) for name in CASES], batch_size=len(CASES))
    said = {token for answer in free for token in answer.tokens}
    assert len(said & set(tiny_base.NEVER)) >= 3
    assert not {token for each in RECORDED.values() for token in each["tokens"]} & set(tiny_base.NEVER)


def test_a_third_turn_does_not_repeat_the_first_two(chat):
    """What the released code's own history does, and its template does not ask for."""
    asked = laid_out(chat, "third turn")
    ids = np.concatenate([asked.example.prefix, asked.example.captions], axis=1)[0].tolist()
    text = chat.processor.tokenizer.decode(ids)
    assert text.count("<|start_header_id|>user") == 3 and text.count("name it") == 1
