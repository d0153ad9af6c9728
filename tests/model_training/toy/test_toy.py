"""The toy world: its truth is true, its captions are read back, and the whole build keeps all of it."""

from __future__ import annotations

import io
import json
from itertools import combinations
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paracaption.filters import rle, text
from paracaption.model_training.model.tokenizer import load_tokenizer, special_token_ids
from paracaption.model_training.toy import scenes
from paracaption.model_training.toy import world as toy
from paracaption.model_training.toy.world import (
    VALUES,
    Attributes,
    WorldOptions,
    format_caption,
    parse_caption,
    score_caption,
    true_attributes,
    write_world,
)
from paracaption.pipeline import config_file
from paracaption.pipeline.corpus import reader, work_list, writer
from paracaption.pipeline.executor import worker
from paracaption.pipeline.models.embedded.lexical import describes
from paracaption.pipeline.sources.registry import open_source
from paracaption.pipeline.stages import recipes
from paracaption.schemas.config import Text
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.records import ImageRecord, Region, Rle

RELATIONS = WorldOptions(relations=True, canvas=((192, 128), (128, 128)))
BARE = WorldOptions(places=False, overlap=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "toy"
    write_world(folder, 16, 0, RELATIONS)
    return folder


def some(name):
    return st.sampled_from(VALUES[name])


kinds = st.tuples(some("size"), some("texture"), some("colour"), some("shape"))
near = st.one_of(st.just(("", "", "")), st.tuples(some("side"), some("near_colour"), some("near_shape")))
every_attributes = st.builds(
    lambda kind, place, near: Attributes(*kind, place, *near), kinds, st.just("") | some("place"), near
)


# Captions.


@settings(deadline=None)
@given(every_attributes)
def test_a_caption_is_read_back_to_what_it_says(attributes):
    assert parse_caption(format_caption(attributes)) == attributes
    assert parse_caption(f" {format_caption(attributes)}\n") == attributes


@settings(deadline=None)
@given(every_attributes)
def test_every_caption_passes_the_text_rules_and_the_judge_and_is_of_the_worlds_words(attributes):
    caption = format_caption(attributes)
    assert text.clean(caption, Text()).reason is None
    assert describes(caption, attributes.shape) > 0
    assert set(caption.replace(",", "").split()) <= set(toy.caption_words())


@pytest.mark.parametrize("category", VALUES["shape"])
def test_the_judge_refuses_another_shape_even_if_it_is_named_as_a_neighbour(category):
    other = next(shape for shape in VALUES["shape"] if shape != category)
    assert describes(f"a large plain red {other} on the left, above a blue {category}", category) < 0


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle",
        "a small plain red circle a small plain red circle",
        "a small plain red circle on the left left of a blue star",
        "a small plain red circle left of a orange star",
        "a small plain red circle, left of a blue star",
        "a small plain red circle at the top left of a blue star",
        "a small plain beige circle on the left",
    ],
)
def test_what_the_world_could_not_have_said_is_not_read(caption):
    assert parse_caption(caption) is None


def test_the_vocabulary_is_small_and_without_repetition():
    assert len(toy.caption_words()) == len(set(toy.caption_words())) == 36


# Scores.

TRUE = "a small plain red circle at the top, left of a blue star"
OTHERS = ["a large plain blue star at the bottom, right of a red circle"]


def test_the_truth_is_exact_and_nothing_else_is():
    assert score_caption(TRUE, TRUE, OTHERS) == (True, (), (), 0.0)
    for name, values in VALUES.items():
        for value in values:
            said = format_caption(parse_caption(TRUE)._replace(**{name: value}))
            found = score_caption(said, TRUE, OTHERS)
            assert found.exact == (said == TRUE)
            assert found.wrong == (() if said == TRUE else (name,))


def test_what_is_wrong_and_right_for_a_neighbour_has_leaked():
    found = score_caption("a small plain blue circle at the top, left of a blue star", TRUE, OTHERS)
    assert (found.wrong, found.leaked) == (("colour",), ("colour",))
    found = score_caption("a small plain green circle at the top, left of a blue star", TRUE, OTHERS)
    assert (found.wrong, found.leaked) == (("colour",), ())
    assert found.by_chance == pytest.approx(1 / 7)  # blue, of seven wrong colours
    whole = score_caption(OTHERS[0], TRUE, OTHERS)
    assert len(whole.leaked) == 7 and "texture" not in whole.wrong


def test_a_neighbour_that_is_alike_leaks_nothing():
    assert (
        score_caption(
            "a small plain green circle", "a small plain red circle", ["a large plain red star"]
        ).leaked
        == ()
    )


@pytest.mark.parametrize(
    ("said", "wrong", "leaked"),
    [
        ("a small plain plain blue circle at the top, left of a blue star", {"colour"}, {"colour"}),
        ("a small red circle at the top, left of a blue", {"texture", "near_shape"}, set()),
        ("small plain red circle at the top left of blue star", set(), set()),
        ("circle left of a red", set(VALUES) - {"shape", "side"}, {"near_colour"}),
        ("", set(VALUES), set()),
        ("\ufffd\n", set(VALUES), set()),
    ],
)
def test_broken_captions_are_never_exact_and_read_as_far_as_they_go(said, wrong, leaked):
    found = score_caption(said, TRUE, OTHERS)
    assert not found.exact
    assert (set(found.wrong), set(found.leaked)) == (wrong, leaked)


@settings(deadline=None)
@given(st.text(max_size=60) | every_attributes.map(format_caption))
def test_any_text_can_be_scored(said):
    found = score_caption(said, TRUE, OTHERS)
    assert set(found.leaked) <= set(found.wrong)
    assert found.exact == (said.strip() == TRUE)


def test_a_truth_of_another_world_is_an_error():
    with pytest.raises(ValueError, match="not a true caption"):
        score_caption(TRUE, TRUE, ["a dog"])


# Scenes.


@pytest.mark.parametrize("options", [WorldOptions(), RELATIONS, BARE], ids=["places", "relations", "bare"])
def test_the_truth_can_be_told_from_the_masks_alone(options):
    for scene in toy.draw_scenes(12, 1, options):
        width, height = scene.size
        masks = [scene.labels == number for number in range(1, len(scene.things) + 1)]
        middles = np.array([np.argwhere(mask).mean(axis=0)[::-1] for mask in masks])
        for number, said in enumerate(true_attributes(scene, options)):
            rows, columns = np.nonzero(masks[number])
            extent = max(np.ptp(rows), np.ptp(columns)) / options.unit_px
            assert (said.size == "large") == (extent > 1.87)
            assert bool(said.place) == options.places and bool(said.side) == options.relations
            if options.places:
                x, y = (int(3 * each) for each in middles[number] / (width, height))
                assert said.place == scenes.PLACES[y][x]
            if options.relations:
                away = middles[number] - middles
                other = int(np.where(np.arange(len(masks)) == number, np.inf, np.hypot(*away.T)).argmin())
                assert scene.things[other].kind[2:] == (said.near_colour, said.near_shape)
                x, y = away[other]
                sides = (
                    ("right of" if x > 0 else "left of")
                    if abs(x) > abs(y)
                    else ("below" if y > 0 else "above")
                )
                assert said.side == sides


def test_a_plain_things_pixels_have_its_colour_and_the_ground_is_grey():
    options = WorldOptions(textures=("plain",), noise=0.0)
    for number, scene in enumerate(toy.draw_scenes(8, 2, options)):
        photo = scenes.paint_scene(scene, 2, number, options).astype(int)
        for label, thing in enumerate(scene.things, 1):
            colour = np.clip(np.add(scenes.COLORS[thing.kind.colour], thing.tint), 0, 255)
            own = np.abs(photo - colour).max(axis=2)[scene.labels == label]
            assert np.median(own) == 0 and (own < 128).mean() > 0.97  # the rest is soft borders
        ground = cv2.erode((scene.labels == 0).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        assert np.ptp(photo[ground], axis=1).max() <= 13


def test_nothing_hides_much_of_another_and_all_is_large_enough_for_the_build():
    for scene in toy.draw_scenes(20, 3, WorldOptions()):
        assert 2 <= len(scene.things) <= 6
        areas = np.bincount(scene.labels.ravel(), minlength=len(scene.things) + 1)[1:]
        assert (areas >= 16**2 / 4).all()
        for thing, area in zip(scene.things, areas, strict=True):
            alone = scenes._label([thing], scene.size, WorldOptions())
            assert area >= 0.9 * np.count_nonzero(alone)


def test_lookalikes_differ_in_one_attribute():
    def alike(options):
        pairs = [
            sum(a != b for a, b in zip(first.kind, second.kind, strict=True)) == 1
            for scene in toy.draw_scenes(25, 4, options)
            for first, second in combinations(scene.things, 2)
        ]
        return np.mean(pairs)

    assert alike(WorldOptions(lookalikes=0.0)) < 0.1 < 0.3 < alike(WorldOptions(lookalikes=0.8))


def contents(number, seed, options, split):
    return [
        scenes.scene_content(t.kind for t in scene.things)
        for scene in toy.draw_scenes(number, seed, options, split)
    ]


def test_no_scene_occurs_twice_and_no_held_out_one_in_training():
    few = WorldOptions(
        colours=("red", "blue"), textures=("plain",), shapes=("circle", "square", "star"), regions=(2, 3)
    )
    train = contents(80, 0, few, "train")
    assert len(set(train)) == len(train)
    assert set(train) & set(contents(80, 1, few, "train"))  # else the next line would say little
    for seed in (0, 1):
        held_out = contents(15, seed, few, "heldout")
        assert len(set(held_out)) == len(held_out)
        assert not set(train) & set(held_out)


def test_a_world_that_has_too_few_scenes_says_so():
    tiny = WorldOptions(colours=("red",), textures=("plain",), shapes=("circle", "bar"), regions=(2, 2))
    with pytest.raises(ConfigError, match="allow more shapes"):
        contents(9, 0, tiny, "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shapes": ("blob",)}, "unknown 'blob'"),
        ({"regions": (4, 2)}, "fewest, most"),
        ({"regions": (1, 2), "relations": True}, "no neighbor"),
        ({"canvas": ((64, 128),)}, "5 units"),
        ({"shapes": ("bar",), "textures": ("dotted",)}, "none of them can be seen"),
        ({"lookalikes": 1.0}, "share below 1"),
    ],
)
def test_options_without_a_world_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        WorldOptions(**changes)


# Source data and its build.


def test_the_same_seed_gives_the_same_bytes_and_another_one_other_scenes(tmp_path, world):
    for name, seed in (("again", 0), ("other", 1)):
        write_world(tmp_path / name, 3, seed, RELATIONS)
    files = [path.relative_to(tmp_path / "again") for path in (tmp_path / "again").glob("*/*")]
    assert len(files) == 6
    assert all((tmp_path / "again" / file).read_bytes() == (world / file).read_bytes() for file in files)
    again, other, longer = (
        list(json.loads((folder / "captions.json").read_text()).items())
        for folder in (tmp_path / "again", tmp_path / "other", world)
    )
    assert again == longer[:3]
    assert [list(each.values()) for _, each in again] != [list(each.values()) for _, each in other]


def test_a_folder_that_is_in_use_is_not_touched(world):
    before = (world / "panoptic.json").read_bytes()
    with pytest.raises(ConfigError, match="not empty"):
        write_world(world, 1, 5)
    assert (world / "panoptic.json").read_bytes() == before


def test_the_build_keeps_every_region_and_gives_it_its_true_caption(world):
    config = config_file.load_config(world / "build.yaml")
    truths = json.loads((world / "captions.json").read_text())
    manifest = build_here(config)
    assert manifest.regions_in == manifest.kept == sum(map(len, truths.values()))
    seen = set()
    for sample, photo in reader.open_corpus(config.out).samples("coconut"):
        seen.add(sample.key)
        assert Image.open(io.BytesIO(photo)).size == (sample.width, sample.height)
        labels = np.array(Image.open(world / "panoptic" / f"{sample.key}.png")).astype(int)
        labels = labels @ (1, 256, 65536)
        expected = truths[sample.key]
        assert len(sample.regions) == len(expected)
        for region in sample.regions:
            mask = rle.decode(Rle(region.rle.size, region.rle.counts)).astype(bool)
            (segment,) = np.unique(labels[mask])
            assert mask.sum() == (labels == segment).sum()
            assert region.caption == expected[str(segment)]
            assert region.category == parse_caption(region.caption).shape
    assert seen == set(truths)


def build_here(config):
    """What a build's workers do, in this process; all images are one unit."""
    folder, run = Path(config.out, "coconut"), Path(config.out, "events")
    run.mkdir(parents=True)
    writer.prepare(folder)
    planned = work_list.make_work_list(open_source(config, "coconut"), config, folder)
    recipe = recipes.recipe_of(config, "coconut")
    job = worker.Job(
        config, "coconut", str(folder), planned.digest, recipes.recipe_digest(recipe, config), str(run)
    )
    done = worker.Worker(job, ["source", *recipe, "write"])({"unit": planned.unit_name(0), "index": 0})
    draft = msgspec.msgpack.decode(done["draft"], type=writer.Draft)
    writer.commit(folder, draft)
    return draft.manifest


def test_a_region_of_another_world_stops_the_captioner(world):
    captioner = toy.TruthCaptioner(str(world / "captions.json"))
    key, expected = next(iter(captioner.captions.items()))
    regions = [Region(number, None, source_id=int(each)) for number, each in enumerate(reversed(expected))]
    image = ImageRecord(key, "coconut", None, 1, 1, regions=regions)
    assert captioner.caption([image]) == [list(reversed(expected.values()))]
    image.regions[0].source_id = 7
    with pytest.raises(ConfigError, match="another world"):
        captioner.caption([image])


def test_the_captioner_is_known_by_what_its_file_holds(tmp_path):
    for name, said in (("one", "a"), ("two", "a"), ("three", "b")):
        (tmp_path / name).write_text(json.dumps({"key": {"1": said}}))
    one, two, three = (toy.TruthCaptioner.identity(str(tmp_path / name)) for name in ("one", "two", "three"))
    assert one == two != three
    with pytest.raises(ConfigError, match=r"captions: .*none: No such file"):
        toy.TruthCaptioner.identity(str(tmp_path / "none"))


# Tokens.


@pytest.fixture(scope="module")
def tokenizer():
    return toy.make_tokenizer()


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@settings(deadline=None)
@given(attributes=every_attributes)
def test_every_word_is_one_token(tokenizer, attributes):
    caption = format_caption(attributes)
    assert len(ids(tokenizer, caption)) == len(caption.replace(",", " ,").split())
    assert tokenizer.decode(ids(tokenizer, caption)) == caption


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_no_character_is_lost(tokenizer, text):
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_the_tokenizer_has_what_a_model_needs_and_the_prompt_is_words(tokenizer, tmp_path):
    from paracaption.model_training.model.processor import PerceptionDLMProcessor
    from tests.tiny.perceptiondlm_model import tiny_config

    numbers = special_token_ids(tokenizer, 6, tmp_path)
    config = tiny_config(tokenizer)
    assert {name: getattr(config, name) for name in numbers} == numbers
    prefix = PerceptionDLMProcessor(tokenizer, config).make_prefix(1, 2)[0]
    single = [token for token in tokenizer.convert_ids_to_tokens(prefix) if len(token) == 1]
    assert set(single) == {".", "\u010a"}  # U+010A is the line break
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert ids(load_tokenizer(tmp_path), "a small dog\n") == ids(tokenizer, "a small dog\n")
