"""The questions of the tiny Base, and the configs that it is trained by."""

import re

import numpy as np
import pytest
import yaml

from benchmarks import toy_base
from benchmarks import toy_base_questions as questions
from benchmarks.toy_base_scores import LENGTHS
from paracaption.model_training.toy import world as toy
from paracaption.pipeline.config_file import load_training


@pytest.fixture(scope="module")
def scenes():
    return list(toy.draw_scenes(30, 5, questions.WORLD, "heldout"))


@pytest.fixture(scope="module")
def asked(scenes):
    return list(questions.held_out(scenes, 12, 0))


def test_all_answers_to_a_kind_of_question_are_as_long_as_they_are_asked_for(asked):
    tokenizer = toy.make_tokenizer(questions.words())
    ids = tokenizer.get_vocab().values()
    assert len(set(ids)) == len(ids) == 1 + max(ids)
    for _, each in asked:
        assert len(tokenizer.tokenize(each.answer)) + 1 == LENGTHS.get(each.kind, 2), each


def test_as_many_questions_of_each_kind_are_asked_each_about_another_scene(asked):
    numbers = [(each.kind, number) for number, each in asked]
    assert len(set(numbers)) == len(numbers) == 12 * len(questions.KINDS)


def test_answers_follow_from_what_is_in_the_scene(scenes, asked):
    for number, each in asked:
        things = questions.things_of(scenes[number])
        if found := re.fullmatch(r"Is there an? (.+)\?", each.question):
            assert (each.answer == "yes") == (found[1] in [thing.name for thing in things])
        elif found := re.fullmatch(r"How many (\w+)s are there\?", each.question):
            named = [thing for thing in things if found[1] in ("thing", thing.kind.shape)]
            assert each.answer == questions.NUMBERS[len(named)]
        elif found := re.fullmatch(r"What color is the (circle|triangle|bar)\?", each.question):
            assert [each.answer] == [thing.kind.colour for thing in things if thing.kind.shape == found[1]]
        elif found := re.fullmatch(r"Is the (\w+ \w+) small or large\?", each.question):
            assert [each.answer] == [thing.kind.size for thing in things if thing.name == found[1]]


def test_all_is_told_about_the_one_thing_that_is_named(scenes):
    rng = np.random.default_rng(9)
    told = [questions.ask_about(scene, "tell", rng) for scene in scenes]
    ways = set()
    for scene, each in zip(scenes, told, strict=True):
        name = each.question.removeprefix("Describe the ").removesuffix(".")
        things = {
            f"a {' '.join(thing.kind)} {questions.PLACES[thing.place // 3][thing.place % 3]}": thing
            for thing in questions.things_of(scene)
        }
        meant = things[each.answer]
        by = {
            "name": lambda thing: thing.name,
            "shape": lambda thing: thing.kind.shape,
            "color": lambda thing: f"{thing.kind.colour} thing",
            "place": lambda thing: f"thing {questions.PLACES[thing.place // 3][thing.place % 3]}",
        }
        found = [way for way, text in by.items() if text(meant) == name]
        assert len(found) == 1
        assert [by[found[0]](thing) for thing in things.values()].count(name) == 1
        ways.update(found)
    assert ways == {"name", "shape", "color", "place"}


def test_a_conversation_asks_nothing_twice_and_knows_what_its_stage_is_about(scenes):
    for stage, (kinds, most) in questions.STAGES.items():
        turns = questions.conversation(scenes[0], stage, np.random.default_rng(stage))
        assert 1 <= len(turns) == len({turn.question for turn in turns}) <= most
        assert {turn.kind for turn in turns} <= set(kinds)


@pytest.mark.parametrize("stage", questions.STAGES)
def test_a_stage_is_trained_by_the_config_of_the_paper_with_named_changes(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(toy_base, "FOLDER", tmp_path)
    path = toy_base.write_config(stage, 7)
    ours, paper = (
        yaml.safe_load(each.read_text())
        for each in (path, toy_base.ROOT / f"configs/train/base-{min(stage, 4)}.yaml")
    )
    changed = {key for key in ours if ours[key] != paper.get(key)}
    named = {*toy_base.CHANGES, "out", "model", "conversations", "data", "steps"}
    assert changed <= {*named, "learning_rate", "min_lr_ratio"}
    assert ours["model"]["config"] == paper["model"]["config"]
    rates = load_training(path).learning_rate
    assert (rates.projector, rates.language) == ((1e-3, 0) if stage == 1 else (toy_base.RATES[stage],) * 2)
