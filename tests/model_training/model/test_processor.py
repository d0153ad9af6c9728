"""From an image and its masks to a sequence, and from tokens to captions."""

import numpy as np
import pytest

from paracaption.model_training.model import tiling
from paracaption.model_training.model.attention import HIDDEN, SHARED
from paracaption.schemas.errors import ConfigError
from tests.model_training.tiny_models import lively, photo


@pytest.fixture(scope="module")
def processor():
    return lively()[1]


@pytest.fixture(scope="module")
def reference():
    return lively(layout="reference")[1]


def words(processor, text):
    """A text's words as tokens; the tiny tokenizer itself writes bytes."""
    return processor.tokenizer.convert_tokens_to_ids([f"Ġ{word}" for word in text.split()])


def text_of(processor, ids):
    return processor.tokenizer.decode(ids)


HEAD = (
    "<|start_header_id|>system<|end_header_id|>\nYou are a helpful assistant.<|eot_id|>\n"
    "<|start_header_id|>user<|end_header_id|>\n<img>"
)
TAIL = "Describe each masked region in detail.<|eot_id|>\n<|start_header_id|>assistant<|end_header_id|>\n"


@pytest.mark.parametrize("regions", [0, 1, 3, 6])
def test_a_sequence_reads_as_the_papers_figure(processor, reference, regions):
    pixels, masks = photo(1, regions)
    for one, last in ((processor, "<|eot_id|>"), (reference, "\n")):
        example = one.make_example(pixels, masks, [[65 + number] for number in range(regions)])
        replay = [f"<|reserved_token_{i}|>" * 4 + "\n" for i in range(regions)]
        image = "<IMG_CONTEXT>" * (4 * len(example.views)) + "</img>"
        assert text_of(one, example.prefix[0]) == HEAD + image + "".join(replay) + TAIL
        words = [text_of(one, [65 + number]) for number in example.order]
        blocks = [f"<|Mask_Cap_{rank}|>{word}{last}" for rank, word in enumerate(words)]
        answer = "".join(blocks)
        if regions and last == "\n":
            answer = answer[:-1] + "<|eot_id|>"
        assert text_of(one, example.captions[0]) == answer


def test_positions_count_on_from_the_prefix_to_the_last_caption(processor, reference):
    for one in (processor, reference):
        example = one.make_example(*photo(0, 3), 5)
        length = example.prefix.shape[1]
        assert example.prefix[1].tolist() == list(range(length))
        assert example.captions[1].tolist() == list(range(length, length + 3 * 7))


def test_positions_can_start_anew_for_each_caption():
    _, processor = lively(layout_options={"restart_positions": True})
    example = processor.make_example(*photo(0, 3), [[65], [66, 66], [67, 67, 67]])
    length = example.prefix.shape[1]
    expected = []
    for number in example.order:
        expected += range(length, length + 3 + number)
    assert example.captions[1].tolist() == expected


def test_line_breaks_between_regions_are_hidden_in_the_reference_and_shared_else(processor, reference):
    newline = processor.config.newline_token_id
    for one, between in ((processor, SHARED), (reference, HIDDEN)):
        ids, _, codes = one.make_example(*photo(0, 3), 2).prefix
        replay = np.flatnonzero(np.isin(ids, one.config.region_token_ids))
        assert codes[replay].tolist() == [1] * 4 + [2] * 4 + [3] * 4
        breaks = replay[3::4] + 1
        assert (ids[breaks] == newline).all()
        assert codes[breaks].tolist() == [between, between, SHARED]
        rest = np.delete(codes, [*replay, *breaks])
        assert (rest == SHARED).all()


def test_regions_go_by_area_and_captions_prompts_and_boxes_with_them(processor):
    pixels = np.zeros((32, 32, 3), np.uint8)
    small, large, middle = (np.zeros((32, 32), bool) for _ in range(3))
    small[:8, :8], large[8:], middle[:8, 16:] = True, True, True
    example = processor.make_example(pixels, [small, large, middle], [[65], [66], [67]], prompts=[4, 0, 2])
    assert example.order == [1, 2, 0]
    assert example.captions[0].reshape(3, 3)[:, 1].tolist() == [66, 67, 65]
    assert example.boxes == [(0, 0.25, 1, 1), (0.5, 0, 1, 0.25), (0, 0, 0.25, 0.25)]
    shown = {prompt: example.prompts[0, prompt].sum() for prompt in range(6)}
    assert shown == {4: 12, 0: 2, 2: 1, 1: 0, 3: 0, 5: 0}


@pytest.mark.parametrize(
    ("regions", "change", "message"),
    [
        (7, None, "7 masks, but the model has 6 region prompts"),
        (3, ("empty", 1), "mask 1 is empty"),
        (3, ("size", 2), "mask 2 is 32x31, the image 32x32"),
        (3, ("turned", 0), "mask 0 has the shape (1, 32, 32)"),
    ],
)
def test_masks_that_do_not_fit_are_errors_that_name_them(processor, regions, change, message):
    pixels, masks = photo(0, regions)
    if change:
        what, number = change
        other = {"empty": masks[number] & False, "size": masks[number][:-1], "turned": masks[number][None]}
        masks[number] = other[what]
    with pytest.raises(ConfigError) as error:
        processor.make_example(pixels, masks, 4)
    assert message in str(error.value)


@pytest.mark.parametrize("captions", [[[65]], [[65], [66], [67]]])
def test_captions_must_be_as_many_as_masks(processor, captions):
    with pytest.raises(ConfigError, match="captions"):
        processor.make_example(*photo(0, 2), captions)


@pytest.mark.parametrize("prompts", [[0], [1, 1], [0, 6], [0, -1]])
def test_each_region_needs_a_prompt_of_its_own(processor, prompts):
    with pytest.raises(ConfigError, match="prompts"):
        processor.make_example(*photo(0, 2), 4, prompts)


def test_reading_gives_captions_in_the_callers_order(processor):
    eot = processor.config.eot_token_id
    tokens = np.array([[*words(processor, "large dog"), eot, 65], words(processor, "red cat at by")])
    assert processor.read_captions(tokens, [1, 0]) == ["red cat at by", "large dog"]


def test_a_caption_ends_at_its_own_end_or_the_answer_ends_with_it(processor, reference):
    eot, [dog] = processor.config.eot_token_id, words(processor, "dog")
    tokens = np.array([words(processor, "red cat at"), [dog, eot, dog], words(processor, "by near hat")])
    assert processor.read_captions(tokens, [2, 0, 1]) == ["dog", "by near hat", "red cat at"]
    assert reference.read_captions(tokens, [2, 0, 1]) == ["dog", "", "red cat at"]
    assert reference.read_captions(tokens[:1], [0]) == ["red cat at"]
    assert processor.read_captions(np.array([[eot, dog, dog]]), [0]) == [""]


def test_special_tokens_within_a_caption_are_left_out(processor):
    config, [red, cat] = processor.config, words(processor, "red cat")
    special = [config.mask_token_id, config.caption_token_ids[3], config.region_token_ids[0]]
    assert processor.read_captions(np.array([[special[0], red, *special[1:], cat]]), [0]) == ["red cat"]


def test_views_and_patches_of_an_example_are_those_of_tiling(processor):
    pixels, masks = photo(1, 2)
    example = processor.make_example(pixels, masks, 3)
    np.testing.assert_array_equal(example.views, tiling.cut_image(pixels, 32, example.grid))
    for place, number in enumerate(example.order):
        expected = tiling.active_patches(masks[number], place, 32, 8, example.grid, processor.layout)
        np.testing.assert_array_equal(example.prompts[:, place], expected)


def test_without_replay_one_token_stands_for_each_region():
    _, processor = lively(feature_replay=False)
    ids = processor.make_example(*photo(0, 2), 3).prefix[0]
    found = ids[np.isin(ids, processor.config.region_token_ids)]
    assert found.tolist() == processor.config.region_token_ids[:2]
