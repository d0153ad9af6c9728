"""Captions of any number of regions of any number of images, in the caller's order."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from paracaption.model_training.decoding.chat import Chat, Question
from paracaption.model_training.decoding.region_captioner import RegionCaptioner
from paracaption.model_training.decoding.sampler import decode_batch
from paracaption.model_training.model.batch import collate
from paracaption.model_training.train.build import _load_saved_model
from paracaption.schemas.decoding import DecodeOptions
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.renames import RenamedWarning
from paracaption.schemas.training import Model
from tests.model_training.tiny_models import lively, photo

OPTIONS = {"max_new_tokens": 4, "steps": 2, "strategy": "per-region"}


@pytest.fixture(scope="module")
def ready():
    """A captioner for three regions at once, in float64."""
    return RegionCaptioner(*lively(num_prompts=3))


@pytest.fixture(scope="module")
def caption(ready):
    def given(pixels, masks, **changes):
        return ready.caption(pixels, masks, **(OPTIONS | changes))

    return given


def groups(ready, pixels, masks, sizes):
    """Captions of consecutive groups of so many masks, each decoded by itself."""
    model, processor = ready.model, ready.processor
    found, start = [], 0
    for size in sizes:
        example = processor.make_example(pixels, masks[start : start + size], OPTIONS["max_new_tokens"])
        tokens = decode_batch(model, collate([example]), DecodeOptions(**OPTIONS)).tokens_BNS[0].numpy()
        found += processor.read_captions(tokens, example.order)
        start += size
    assert start == len(masks)
    return found


@pytest.mark.parametrize(
    ("regions", "sizes"),
    [(1, [1]), (3, [3]), (4, [2, 2]), (5, [3, 2]), (7, [3, 2, 2]), (9, [3, 3, 3]), (10, [3, 3, 2, 2])],
)
def test_more_regions_than_prompts_are_split_evenly_and_come_back_in_order(ready, caption, regions, sizes):
    pixels, masks = photo(1, regions)
    found = caption(pixels, masks)
    assert found == groups(ready, pixels, masks, sizes)
    assert regions == 1 or len(set(found)) > 1, "an order shows"


def test_captions_are_in_the_order_of_the_masks_whatever_their_areas(caption):
    pixels, masks = photo(3, 3)
    masks.sort(key=np.count_nonzero)
    assert len({np.count_nonzero(mask) for mask in masks}) == 3, "ties are ordered by place"
    captions = caption(pixels, masks)
    assert len(set(captions)) == 3
    for order in ([2, 1, 0], [1, 2, 0]):
        assert caption(pixels, [masks[i] for i in order]) == [captions[i] for i in order]


def test_no_regions_have_no_captions(ready, caption):
    pixels, _ = photo(0, 0)
    assert caption(pixels, []) == []
    assert list(ready.caption_steps(pixels, [], **OPTIONS)) == []
    assert ready.caption_photos([]) == []
    [nothing] = ready.caption_photos([(pixels, [])])
    assert (nothing.captions, nothing.forwards, nothing.tokens) == ([], 0, 0)


def test_one_region_per_call_captions_each_by_itself(ready, caption):
    pixels, masks = photo(2, 4)
    alone = [caption(pixels, [mask])[0] for mask in masks]
    assert caption(pixels, masks, regions_per_call=1) == alone
    assert caption(pixels, masks, regions_per_call=2) == groups(ready, pixels, masks, [2, 2])
    assert caption(pixels, masks, regions_per_call=99) == caption(pixels, masks), "more than prompts: as many"
    with pytest.raises(ConfigError, match="regions_per_call: 0; give at least 1"):
        caption(pixels, masks, regions_per_call=0)


IMAGES = [photo(seed, regions) for seed, regions in ((0, 2), (1, 0), (2, 7), (3, 3), (4, 1), (5, 4))]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_images_share_batches_and_results_do_not_depend_on_how(ready, caption, batch_size):
    found = ready.caption_photos(iter(IMAGES), DecodeOptions(**OPTIONS), batch_size=batch_size)
    assert [result.captions for result in found] == [caption(*image) for image in IMAGES]
    assert [result.tokens for result in found] == [len(masks) * 4 for _, masks in IMAGES]
    assert [result.forwards for result in found] == [2, 0, 6, 2, 2, 4]  # two steps for each group
    assert [result.seconds > 0 for result in found] == [bool(masks) for _, masks in IMAGES]
    assert all(result.agreement is None for result in found)


@pytest.mark.parametrize("before", [0, 1, 4])
def test_photos_without_regions_are_given_when_it_is_their_turn_and_before_an_error(ready, before):
    pixels, masks = photo(1, 1)
    taken = []

    def photos():
        for number in range(before + 12):
            taken.append(number)
            yield pixels, masks if number < before else []
        raise OSError("the disk is gone")

    found = ready.iter_captions(photos(), batch_size=2, **OPTIONS)
    for number in range(before + 12):
        assert len(next(found).captions) == (number < before)
        assert before or len(taken) < number + 6, "no more than a few are read ahead"
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)


def test_a_cache_that_does_not_suit_the_model_is_an_error_at_once():
    captioner = RegionCaptioner(*lively(layout="reference", num_prompts=3))
    pixels, masks = photo(1, 1)
    for call in (
        lambda: captioner.iter_captions([(pixels, masks)], cache="exact"),
        lambda: captioner.caption_steps(pixels, masks, cache="exact"),
        lambda: Chat(captioner.model, captioner.processor).ask_steps(Question("what"), cache="exact"),
    ):
        with pytest.raises(ConfigError, match="isolates the prefix"):
            call()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_recorded_steps_are_those_of_the_stream_whatever_is_decoded_at_once(ready, batch_size):
    pixels, masks = photo(2, 7)
    options = DecodeOptions(**(OPTIONS | {"strategy": "threshold", "threshold": 0.3, "steps": 4}))
    expected = list(ready.caption_steps(pixels, masks, options, regions_per_call=2))
    found = ready.record_steps(pixels, masks, options, regions_per_call=2, batch_size=batch_size)
    assert [shot.captions for shot in found] == [shot.captions for shot in expected]
    assert [shot.forwards for shot in found] == [shot.forwards for shot in expected]
    assert [[slot.token for row in shot.slots for slot in row] for shot in found] == [
        [slot.token for row in shot.slots for slot in row] for shot in expected
    ]
    assert ready.record_steps(pixels, []) == []


def test_agreement_is_an_images_own_over_all_of_its_groups():
    captioner = RegionCaptioner(*lively(layout="reference", num_prompts=3))
    options = DecodeOptions(**(OPTIONS | {"steps": 4}), cache="approximate", refresh_every=9, compare=True)
    alone = [
        captioner.caption_photos([image], options, batch_size=1)[0].agreement for image in IMAGES if image[1]
    ]
    together = captioner.caption_photos(IMAGES, options, batch_size=3)
    assert [result.agreement for result in together if result.captions] == pytest.approx(alone)
    assert len(set(alone)) > 1
    assert together[1].agreement is None
    pixels, masks = IMAGES[2]
    parts = [captioner.caption_photos([(pixels, masks[part])], options)[0].agreement for part in PARTS]
    assert alone[1] == pytest.approx((3 * parts[0] + 2 * parts[1] + 2 * parts[2]) / 7)


PARTS = [slice(3), slice(3, 5), slice(5, 7)]
"""Groups of seven regions."""


@pytest.mark.parametrize("regions", [1, 3, 5])
@pytest.mark.parametrize("strategy", ["remask", "threshold", "sequential"])
def test_a_stream_ends_with_what_caption_returns(ready, caption, strategy, regions):
    model, processor = ready.model, ready.processor
    pixels, masks = photo(3, regions)
    options = OPTIONS | {"strategy": strategy}
    shots = list(ready.caption_steps(pixels, masks, **options))
    assert shots[-1].captions == caption(pixels, masks, **options)
    first, last = shots[0], shots[-1]
    assert first.forwards == 0
    assert first.captions == [""] * regions
    assert [[slot.text for slot in row] for row in first.slots] == [[None] * 4] * regions
    assert {slot.token for row in first.slots for slot in row} == {model.config.mask_token_id}
    for row in last.slots:
        assert len(row) == 4
        assert all(0 < slot.confidence <= 1 for slot in row)
        for slot in row:
            assert slot.text == processor.tokenizer.decode([slot.token])
    assert [shot.forwards for shot in shots] == sorted(shot.forwards for shot in shots)


def test_a_stream_shows_what_is_written_so_far(ready):
    pixels, masks = photo(3, 2)
    options = DecodeOptions(max_new_tokens=4, steps=4, strategy="left-to-right", early_exit=False)
    for step, shot in enumerate(ready.caption_steps(pixels, masks, options)):
        assert [[slot.text is not None for slot in row] for row in shot.slots] == [
            [slot < step for slot in range(4)]
        ] * 2


def test_a_pillow_image_of_any_mode_is_as_its_pixels(caption):
    pixels, masks = photo(1, 2)
    expected = caption(pixels, masks)
    picture = Image.fromarray(pixels)
    assert caption(picture, masks) == expected
    assert caption(picture.convert("RGBA"), masks) == expected
    gray = picture.convert("L")
    expected = caption(np.repeat(np.asarray(gray)[..., None], 3, axis=2), masks)
    assert caption(gray, masks) == expected
    assert caption(Image.fromarray(np.asarray(gray).astype(np.uint16) * 257), masks) == expected, "16 bits"


def test_masks_may_be_numbers_or_tensors(caption):
    pixels, masks = photo(1, 2)
    expected = caption(pixels, masks)
    assert caption(pixels, [mask.astype(np.uint8) * 255 for mask in masks]) == expected
    assert caption(pixels, [torch.from_numpy(mask) for mask in masks]) == expected
    assert caption(pixels, np.stack(masks)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: mask & False, "mask 4 is empty"),
        (lambda mask: mask[1:], "mask 4 is"),
        (
            lambda mask: mask[..., None],
            r"mask 4 has the shape \(40, 90, 1\): give .* the shape \(40, 90\)",
        ),
        (lambda mask: mask[None], r"mask 4 has the shape \(1, 40, 90\)"),
    ],
)
def test_a_mask_that_cannot_be_captioned_is_named_by_the_callers_number(caption, change, message):
    pixels, masks = photo(1, 5)
    masks[4] = change(masks[4])
    with pytest.raises(ConfigError, match=message):
        caption(pixels, masks)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((9, 9), np.uint8),
        np.zeros((9, 9, 4), np.uint8),
        np.zeros((9, 9, 3), np.float32),
        Image.fromarray(np.zeros((9, 9), np.float32)),
        42,
        None,
    ],
)
def test_pixels_of_another_shape_or_type_are_an_error(caption, pixels):
    with pytest.raises(ConfigError, match=r"photo 0: .*uint8 RGB"):
        caption(pixels, [np.ones((9, 9), bool)])


def test_unknown_options_are_errors_that_say_what_there_is(ready, caption):
    pixels, masks = photo(0, 1)
    with pytest.raises(
        ConfigError, match=r"(?s)speed: unknown key; .*the keys are strategy, .*beams: unknown"
    ):
        caption(pixels, masks, speed=2, beams=3)
    with pytest.raises(ConfigError, match=r"strategy: has to be 'remask'.*'best'"):
        caption(pixels, masks, strategy="best")
    with pytest.raises(ConfigError, match="gen_length: unknown key"):
        ready.caption_steps(pixels, masks, gen_length=32)


def test_fields_given_by_themselves_differ_from_the_options(ready, caption):
    pixels, masks = photo(1, 2)
    options = DecodeOptions(**OPTIONS)
    assert ready.caption(pixels, masks, options) == caption(pixels, masks)
    assert ready.caption(pixels, masks, options, steps=4) == caption(pixels, masks, steps=4)


def test_a_saved_model_captions_as_it_did(tmp_path, ready):
    pixels, masks = photo(1, 2)
    ready.model.save_pretrained(tmp_path)
    ready.processor.save_pretrained(tmp_path)
    saved = RegionCaptioner.load(tmp_path, "cpu", "float32")
    expected = RegionCaptioner(*lively(num_prompts=3, dtype=torch.float32))
    assert saved.caption(pixels, masks, **OPTIONS) == expected.caption(pixels, masks, **OPTIONS)
    assert [*saved.caption_steps(pixels, masks, **OPTIONS)][-1].captions == saved.caption(
        pixels, masks, **OPTIONS
    )


LACK = "language_model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weights: weights.pop(LACK), f"missing: {LACK};"),
        (lambda weights: weights.pop("lm_head.weight"), "missing: lm_head.weight;"),
        (lambda weights: weights.pop("region_prompts.weight"), "missing: region_prompts.weight;"),
        (
            lambda weights: weights.update({LACK: weights[LACK][:5]}),
            f"another shape: {LACK} is 5x32, not 48x32;",
        ),
        (lambda weights: weights.update({"extra.weight": torch.ones(2)}), "unknown: extra.weight;"),
        (lambda weights: [weights.pop(name) for name in [*weights] if ".mlp." in name], "and 11 more;"),
    ],
)
def test_a_saved_model_that_lacks_weights_is_an_error_that_names_them(tmp_path, ready, change, told):
    ready.model.save_pretrained(tmp_path)
    ready.processor.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file({name: each.contiguous() for name, each in weights.items()}, tmp_path / "model.safetensors")
    chosen = Model(path=str(tmp_path))
    for load in (lambda: RegionCaptioner.load(tmp_path, "cpu"), lambda: _load_saved_model(chosen, "sdpa")):
        with pytest.raises(ConfigError, match=re.escape(told)) as raised:
            load()
        assert str(raised.value).startswith(f"{tmp_path}: ") and "\n" not in str(raised.value)


def test_the_captioner_and_what_commands_check_first_are_imported_without_torch():
    script = """
import sys
import paracaption.model_training.decoding.answered
import paracaption.model_training.decoding.caption_photo
import paracaption.model_training.decoding.region_captioner
print(*sorted({"torch", "transformers", "ray", "cv2"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_an_option_given_by_its_old_name_is_translated_alone(ready, caption):
    pixels, masks = photo(1, 2)
    changes = {name: value for name, value in OPTIONS.items() if name != "max_new_tokens"}
    with pytest.warns(RenamedWarning, match="`length` is now `max_new_tokens`"):
        found = ready.caption(pixels, masks, **changes, length=OPTIONS["max_new_tokens"])
    assert found == caption(pixels, masks)
