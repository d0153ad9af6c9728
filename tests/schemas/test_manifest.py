import json

import msgspec
import pytest

from paracaption.schemas.manifest import FileEntry, Manifest, decode, encode
from paracaption.schemas.reasons import Reason


def manifest(**changes) -> Manifest:
    values = {
        "unit": "coconut-000000",
        "subset": "coconut",
        "plan": "p" * 64,
        "recipe": "r" * 16,
        "shard": FileEntry("shards/coconut-000000.tar", 10240, "a" * 64),
        "ledger": FileEntry("ledger/coconut-000000.parquet", 99, "b" * 64),
        "images": {"b": 1, "a": 0},
        "regions_in": 3,
        "kept": 1,
        "dropped": {"source/crowd": 2},
        "images_dropped": {Reason.PHOTO_MISSING: 1},
    }
    return Manifest(**{**values, **changes})


@pytest.mark.parametrize("changes", [{}, {"shard": None}, {"images": {"ü": 1}}, {"dropped": {}}])
def test_a_manifest_comes_back_as_it_went(changes):
    assert decode(encode(manifest(**changes))) == manifest(**changes)


def test_equal_manifests_are_equal_bytes_with_sorted_keys():
    one = encode(manifest(images={"a": 0, "b": 1}))
    assert one == encode(manifest(images={"b": 1, "a": 0}))
    assert one.endswith(b"}\n")
    parsed = json.loads(one)
    assert list(parsed) == sorted(parsed)
    assert list(parsed["shard"]) == sorted(parsed["shard"])


def test_another_count_is_other_bytes():
    assert encode(manifest()) != encode(manifest(kept=2))


@pytest.mark.parametrize("name", sorted(set(Manifest.__struct_fields__) - {"failed"}))
def test_a_manifest_that_lacks_a_field_is_refused(name):
    content = json.loads(encode(manifest()))
    del content[name]
    with pytest.raises(msgspec.ValidationError, match=name):
        decode(json.dumps(content).encode())


def test_what_failed_is_left_out_where_nothing_did_and_old_manifests_have_none():
    assert "failed" not in json.loads(encode(manifest()))
    assert decode(encode(manifest())).failed == {}
    assert decode(encode(manifest(failed={"transient": 2}))).failed == {"transient": 2}


def test_an_unknown_reason_is_refused():
    content = json.loads(encode(manifest())) | {"images_dropped": {"bad luck": 1}}
    with pytest.raises(msgspec.ValidationError):
        decode(json.dumps(content).encode())
