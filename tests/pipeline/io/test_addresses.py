"""Places of corpora that are refused before anything is asked there."""

import pytest

from paracaption.pipeline.config_file import load_config
from paracaption.pipeline.io.location import Prefix, locate
from paracaption.schemas.errors import ConfigError


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("s3:/bucket/corpus", "write s3://bucket/corpus"),
        ("S3:/bucket/corpus", "write s3://bucket/corpus"),
        ("s3:bucket/corpus", "write s3://bucket/corpus"),
        ("gcs:/bucket/corpus", "write gs://bucket/corpus"),
        ("S3://bucket/corpus", "write s3://"),
        ("abfss://bucket/corpus", "write az://"),
        ("s3://user:hunter22@bucket/corpus", "leave it out, and set AWS_ACCESS_KEY_ID"),
        ("s3://bucket/corpus?X-Amz-Signature=hunter22", "holds a query or a signature"),
        ("s3://", "names no bucket"),
        ("s3://bucket/a//b", "empty part"),
        ("s3://bucket/../b", "`..`"),
    ],
)
def test_a_place_that_is_read_is_refused_as_one_that_is_written(place, told):
    with pytest.raises(ConfigError) as caught:
        locate(place)
    assert told in str(caught.value) and "hunter22" not in str(caught.value)


@pytest.mark.parametrize(
    "place", ["s3://bucket", "az://c/a b", "s3://b/\u00fc*[x]/%20", "https://host/a?b=c"]
)
def test_other_urls_pass(place):
    assert locate(place) == Prefix(place)


@pytest.mark.parametrize("place", ["s3/bucket", "./s3:/bucket", "/s3:/bucket", "a s3:b", "azure"])
def test_paths_pass(place):
    assert str(locate(place)) == place.removeprefix("./")


@pytest.mark.parametrize("key", ["out", "photos"])
def test_a_configuration_with_a_slash_too_few_names_the_key_and_makes_no_folder(tmp_path, key):
    paths = {"out": "out", "photos": "photos"} | {key: "s3:/bucket/here"}
    config = tmp_path / "build.yaml"
    config.write_text(
        f"out: {paths['out']}\n"
        f"coconut: [{{annotations: [a.json], labels: masks, photos: ['{paths['photos']}']}}]\n"
    )
    with pytest.raises(ConfigError, match=rf"{key}.*write s3://bucket/here"):
        load_config(config)
    assert list(tmp_path.iterdir()) == [config]
