import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paracaption.schemas.reasons import ERRORS, Reason
from paracaption.schemas.records import Blob, Drop, ImageRecord, Region, Rle
from paracaption.schemas.sample import Sample, to_sample

DROP = Drop("source", Reason.CROWD, "many")


def region(number: int, **changes) -> Region:
    return Region(**{"id": number, "rle": Rle((4, 6), "0h0"), "caption": "a cat", **changes})


def image(*regions: Region, **changes) -> ImageRecord:
    values = {"key": "a", "subset": "sa1b", "photo": Blob("/a.tar", 512, 7), "width": 6, "height": 4}
    return ImageRecord(**{**values, "regions": list(regions), **changes})


_texts = st.text() | st.none()
_regions = st.builds(
    Region,
    id=st.integers(0, 2**31),
    rle=st.none() | st.builds(Rle, st.tuples(st.integers(0, 9000), st.integers(0, 9000)), st.text()),
    source_id=st.none() | st.integers(-(2**63), 2**63 - 1),
    category=_texts,
    source_scores=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)),
    crop_box=st.none() | st.lists(st.floats(0, 1e6), min_size=4, max_size=4),
    caption=_texts,
    drop=st.none() | st.builds(Drop, st.text(), st.sampled_from(Reason), st.text()),
)


@given(st.lists(_regions, max_size=4), st.none() | st.builds(Blob, st.text(), st.integers(0, 2**62)))
def test_an_image_comes_back_from_msgpack_as_it_went(regions, photo):
    given_image = image(*regions, photo=photo)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(given_image), type=ImageRecord) == given_image


def test_live_regions_are_those_without_a_drop_in_order():
    assert [each.id for each in image(region(2), region(0, drop=DROP), region(1)).live()] == [2, 1]
    assert image(region(0), drop=DROP).live() == []


def test_a_rejected_image_drops_what_is_live_and_leaves_earlier_reasons():
    before = Drop("usable_masks", Reason.MASK_TOO_SMALL)
    rejected = image(region(0, drop=before), region(1))
    rejected.reject(DROP)
    assert [each.drop for each in rejected.regions] == [before, DROP]
    assert (rejected.drop, rejected.live()) == (DROP, [])


def test_images_do_not_share_their_lists():
    first, second = ImageRecord("a", "sa1b", None, 1, 1), ImageRecord("b", "sa1b", None, 1, 1)
    first.regions.append(region(0))
    assert second.regions == []


def test_a_blob_names_its_bytes():
    assert str(Blob("/a.jpg")) == "/a.jpg"
    assert str(Blob("/a.tar", 512, 7)) == "/a.tar@512+7"


def test_an_unknown_reason_is_refused():
    with pytest.raises(msgspec.ValidationError, match="Invalid enum value"):
        msgspec.json.decode(b'{"stage": "source", "reason": "bad luck"}', type=Drop)


def test_reasons_are_written_as_their_own_names_and_errors_are_some_of_them():
    assert all(reason.value == reason.name.lower() for reason in Reason)
    assert set(Reason) > ERRORS


def test_a_sample_holds_the_live_regions_with_every_field():
    sample = to_sample(image(region(0, drop=DROP), region(1, category="cat")))
    assert [each.id for each in sample.regions] == [1]
    assert (sample.regions[0].category, sample.regions[0].core_category) == ("cat", "")
    data = msgspec.json.encode(sample)
    assert b'"core_category":""' in data, "one schema for all samples"
    assert msgspec.json.decode(data, type=Sample) == sample
