"""The GAR captioner with the real engine: the same captions of however many, and never too many inside."""

from contextlib import contextmanager

import msgspec
import pytest

from paracaption.schemas.errors import BadRecord, ConfigError
from paracaption.schemas.records import Blob
from tests.machinery import alone
from tests.pipeline.models.gar_parts import TILE_PX, photo, with_boxes
from tests.tiny.gar import write_gar

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

BOXES = [(5, 5, 60, 60), (400, 200, 40, 20), (0, 0, 448, 224), (100, 90, 40, 40), (330, 20, 30, 30)]
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """Of the larger model's kind: no class token, a head of its own, weights in several files."""
    from paracaption.pipeline.models.gar.captioner import GarCaptioner

    model = write_gar(tmp_path_factory.mktemp("gar") / "GAR", "8b", tile_px=TILE_PX, max_tiles=8)
    with alone():
        found = GarCaptioner(model=str(model), max_tokens=NEW_TOKENS, device="cpu", max_in_flight=16)
    yield found
    found.close()


@contextmanager
def options(captioner, **changed):
    before = captioner.options
    captioner.options = msgspec.structs.replace(before, **changed)
    try:
        yield
    finally:
        captioner.options = before


@contextmanager
def watched(captioner):
    """A list that gets (regions inside, regions taken so far) at each of the engine's steps."""
    engine, inside, taken = captioner.engine.engine, [], [0]
    step, add = engine.step, engine.add_request

    def counted_add(*args):
        taken[0] += 1
        return add(*args)

    def counted_step():
        inside.append((engine.get_num_unfinished_requests(), taken[0]))
        return step()

    engine.step, engine.add_request = counted_step, counted_add
    try:
        yield inside
    finally:
        del engine.step, engine.add_request


def images_of(folder):
    return [
        with_boxes(photo(folder, "a", seed=1), *BOXES),
        with_boxes(photo(folder, "b", (448, 112), 2), *BOXES[:1]),
        with_boxes(photo(folder, "c", (96, 96), 3), (1, 1, 30, 30), (10, 60, 80, 30)),
    ]


def test_captions_are_those_of_one_region_at_a_time_by_transformers(captioner, tmp_path):
    """The export's greedy answers in vLLM, all at once, are transformers' to the same prompts, one by one."""
    import torch
    from transformers import LlamaForCausalLM

    from paracaption.pipeline.models.gar import export

    images = images_of(tmp_path)
    folder = export.default_folder(captioner.options.model)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stop = captioner.prompts.stop
    texts = captioner.caption(images)
    assert len({text for row in texts for text in row}) > 4, "regions differ"
    for request in captioner.requests(images):
        prompt = request.prompt["prompt_embeds"]
        with torch.inference_mode():
            tokens = model.generate(
                inputs_embeds=prompt[None],
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=stop,
            )
        number, place = request.key
        assert texts[number][place] == captioner.prompts.read(tokens[0].tolist())


def test_many_regions_have_the_captions_of_one_at_a_time(captioner, tmp_path):
    images = images_of(tmp_path)
    together = captioner.caption(images)
    assert [len(row) for row in together] == [5, 1, 2]
    for image, texts in zip(images, together, strict=True):
        for region, text in zip(image.regions, texts, strict=True):
            image.regions = [region]
            assert captioner.caption([image]) == [[text]]


def test_an_image_is_given_as_soon_as_it_is_done_before_the_last_ones_are_begun(captioner, tmp_path):
    images = images_of(tmp_path)
    expected = captioner.caption(images)
    with options(captioner, max_in_flight=2), watched(captioner) as inside:
        given = captioner.caption_each(images)
        assert next(given) == (0, expected[0])
        assert inside[-1][1] < sum(len(image.regions) for image in images), "some are not even encoded"
        assert list(given) == [(1, expected[1]), (2, expected[2])]
    assert captioner._kept == {}


def test_regions_without_a_mask_and_images_without_regions_have_no_caption(captioner, tmp_path):
    plain = photo(tmp_path, "a")
    empty = with_boxes(plain, (0, 0, 0, 0), BOXES[0])
    alone = captioner.caption([with_boxes(plain, BOXES[0])])[0]
    assert captioner.caption([]) == []
    assert captioner.caption([plain]) == [[]]
    assert captioner.caption([plain, empty, plain]) == [[], [None, *alone], []]


def test_prompts_in_flight_are_bounded_in_bytes(captioner, tmp_path):
    images = images_of(tmp_path)[:1]
    [size] = {request.num_bytes for request in captioner.requests(images)}
    expected = captioner.caption(images)
    for limit, most in [(2.5 * size, 3), (2.0 * size, 2), (1.0, 1)]:
        with options(captioner, in_flight_gb=limit / 1e9), watched(captioner) as inside:
            assert captioner.caption(images) == expected
        assert max(count for count, _ in inside) == most


def test_the_engine_stays_full_from_the_first_region_to_the_last(captioner, tmp_path):
    """Across images: the next one's regions are encoded while the last one's decode."""
    images = images_of(tmp_path)
    for image in images_of(tmp_path):
        image.key += "again"
        images.append(image)
    total = sum(len(image.regions) for image in images)
    with options(captioner, max_in_flight=3), watched(captioner) as inside:
        captioner.caption(images)
    assert inside[-1][1] == total
    assert {count for count, taken in inside if taken < total} == {3}


@pytest.mark.parametrize("ahead", [0, 4])
def test_a_photo_that_cannot_be_read_fails_alone_and_finished_answers_are_kept(
    captioner, tmp_path, monkeypatch, ahead
):
    images = images_of(tmp_path)
    expected = captioner.caption(images)
    images[1].photo = Blob(str(tmp_path / "not there.png"))
    monkeypatch.setattr(captioner, "_ahead", ahead)
    monkeypatch.setattr(captioner.encoder.batches, "size", 1)  # the second photo is not read with the first
    with options(captioner, max_in_flight=1), pytest.raises(BadRecord, match=r"not there\.png"):
        captioner.caption(images)
    assert not captioner.engine.engine.has_unfinished_requests()
    with watched(captioner) as inside:
        assert captioner.caption([images[0]]) == [expected[0]]
    assert (inside[-1][1] if inside else 0) < len(BOXES), "what was finished is not asked again"
    assert captioner.caption([images[2]]) == [expected[2]]
    assert captioner._kept == {}


def test_engine_arguments_that_vllm_refuses_are_named(captioner):
    from paracaption.pipeline.models.gar.captioner import GarCaptioner

    with pytest.raises(ConfigError, match=r"captioner\.options\.engine: vLLM refuses .*no_such_argument"):
        GarCaptioner(
            model=captioner.options.model, max_tokens=4, device="cpu", engine={"no_such_argument": 1}
        )
