"""From sequences to a batch: each example in a row of its own, or all packed into one."""

import pytest
import torch

from paracaption.model_training.model.attention import PADDING
from paracaption.model_training.model.batch import collate, pack
from tests.model_training.tiny_models import examples, lively


@pytest.fixture(scope="module")
def processor():
    return lively()[1]


def rows(tokens):
    """Each sample's tokens of a batch, without padding: (ids, positions, codes, is caption), by sample."""
    fields = (tokens.ids_BL, tokens.position_BL, tokens.roles.region_BL, tokens.roles.caption_BL)
    samples = tokens.roles.sample_BL
    found = sorted(set(samples.unique().tolist()) - {PADDING})
    return [[field[samples == sample].tolist() for field in fields] for sample in found]


def test_a_packed_row_holds_what_a_batch_holds(processor):
    found = examples(processor, [2, 0, 6, 1])
    batch, (images, packed) = collate(found), pack(found)
    tokens = batch.tokens()
    assert rows(packed) == rows(tokens)
    assert PADDING not in packed.roles.sample_BL
    assert packed.ids_BL.shape == (
        1,
        sum(example.prefix.shape[1] + example.captions.shape[1] for example in found),
    )
    assert [len(row[0]) for row in rows(tokens)] != [tokens.ids_BL.shape[1]] * 4, "there is padding"
    for one, other in zip(images, batch.images, strict=True):
        assert torch.equal(one, other)


def test_a_batch_is_each_example_in_a_row_with_padding_after_prefix_and_captions(processor):
    found = examples(processor, [2, 0, 6])
    batch = collate(found)
    for row, example in enumerate(found):
        for part, tokens in ((example.prefix, batch.prefix), (example.captions, batch.captions)):
            length = part.shape[1]
            assert tokens.ids_BL[row, :length].tolist() == part[0].tolist()
            assert tokens.position_BL[row, :length].tolist() == part[1].tolist()
            assert tokens.roles.region_BL[row, :length].tolist() == part[2].tolist()
            assert (tokens.roles.sample_BL[row, :length] == row).all()
            assert (tokens.roles.sample_BL[row, length:] == PADDING).all()
            assert not tokens.roles.caption_BL[row, length:].any()
    assert batch.captions.roles.caption_BL.sum() == 8 * 6
    assert not batch.prefix.roles.caption_BL.any()


def test_a_batchs_parts_have_their_types_also_without_any_region(processor):
    for regions in ([2, 1], [0], [0, 0]):
        images = collate(examples(processor, regions)).images
        assert images.views_N3SS.dtype == torch.uint8
        assert images.prompts_NPQ.dtype == torch.bool
        assert images.boxes_R4.dtype == torch.float32
        assert images.boxes_R4.shape == (sum(regions), 4)
        assert images.grids_I2.dtype == images.image_R.dtype == torch.int64
