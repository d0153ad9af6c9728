"""What is refused before a corpus is written to a bucket."""

import socket

import pytest

from paracaption.pipeline.io import bucket_checks, bucket_versions
from paracaption.pipeline.io.bucket_checks import PROBE, check_node, check_store, refuse_secrets
from paracaption.pipeline.io.buckets import BucketStore
from paracaption.pipeline.io.process_identity import name_of, this_process
from paracaption.pipeline.io.store import store_of
from paracaption.schemas.errors import ConfigError
from tests.object_server import serving

pytest.importorskip("obstore")
OUT = "s3://corpus/out"


@pytest.fixture(autouse=True)
def _nothing_was_tried(monkeypatch):
    monkeypatch.setattr(bucket_checks, "_tried", set())


@pytest.mark.soak(keep=1)
def test_a_store_that_can_all_is_tried_once_and_nothing_is_left(bucket_out):
    check_store(bucket_out)
    assert store_of(bucket_out).list(bucket_out) == []


def test_it_is_tried_once_for_each_bucket(faulty_s3):
    check_store(OUT)
    asked = len(faulty_s3.requests())
    check_store(f"{OUT}/other")
    assert len(faulty_s3.requests()) == asked < 15
    assert faulty_s3.objects() == {}


def test_a_store_that_ignores_conditions_is_refused_and_nothing_is_left(faulty_s3):
    faulty_s3.set_faults(ignores_conditions=True)
    for _ in range(2):
        with pytest.raises(ConfigError, match="s3://corpus: the store ignores `If-None-Match") as caught:
            check_store(OUT)
        assert "\n" not in str(caught.value)
    assert faulty_s3.objects() == {}


def test_a_store_that_knows_no_conditions_is_refused(faulty_s3):
    faulty_s3.fail("501", "PUT", count=None)
    with pytest.raises(ConfigError, match="HTTP 501 Not Implemented"):
        check_store(OUT)


def test_a_bucket_that_is_not_there_or_may_not_be_written_is_refused(faulty_s3):
    with pytest.raises(ConfigError, match="make the bucket"):
        check_store("s3://nobody/out")
    faulty_s3.fail("403", "PUT", count=None)
    with pytest.raises(ConfigError, match=r"HTTP 403.*AWS_ACCESS_KEY_ID"):
        check_store(OUT)


def test_an_outage_is_no_verdict(faulty_s3):
    faulty_s3.fail("503", count=None)
    with pytest.raises(OSError, match="HTTP 503"):
        check_store(OUT)
    assert {call["method"] for call in faulty_s3.requests()} == {"PUT"}  # nor is it asked to delete


def test_a_trial_that_is_swept_meanwhile_is_made_again(faulty_s3, monkeypatch):
    create = BucketStore.create

    def create_and_sweep_once(self, path, data):
        done = create(self, path, data)
        monkeypatch.setattr(BucketStore, "create", create)
        self.delete(path)
        return done

    monkeypatch.setattr(BucketStore, "create", create_and_sweep_once)
    check_store(OUT)
    assert faulty_s3.objects() == {}


def test_what_killed_trials_left_is_deleted_when_it_is_old(faulty_s3, monkeypatch):
    for name in ("1", "2"):
        store_of(OUT).put(f"{OUT}/{PROBE}{name}", b"1")
    check_store(OUT)
    assert len(faulty_s3.objects()) == 2  # another driver may be at it
    monkeypatch.setattr(bucket_checks, "_ABANDONED_S", -1.0)
    bucket_checks._tried.clear()
    check_store(OUT)
    assert faulty_s3.objects() == {}


@pytest.mark.parametrize("folder", [OUT, f"{OUT}/review"])
def test_what_a_killed_process_of_this_machine_left_is_deleted_by_the_next_trial(
    faulty_s3, monkeypatch, folder
):
    monkeypatch.setattr(bucket_versions, "_tried", set())
    here = this_process()
    for process in (here, here._replace(started="1"), here._replace(host="elsewhere", started="1")):
        store_of(OUT).put(f"{folder}/{PROBE}0123456789ab~{name_of(process)}", b"1")
    if folder == OUT:
        check_store(OUT)
    else:
        assert bucket_versions.put_version(f"{folder}/marks.parquet", b"1", None)
    left = [key for key in faulty_s3.objects() if PROBE in key]
    assert len(left) == 2 and not [key for key in left if "~1~" in key and "elsewhere" not in key]


def test_a_trial_of_reviews_that_is_swept_meanwhile_is_made_again(faulty_s3, monkeypatch):
    read = bucket_versions.read_version

    def swept_once(url):
        found = read(url)
        monkeypatch.setattr(bucket_versions, "read_version", read)
        store_of(url).delete(url)
        return found

    monkeypatch.setattr(bucket_versions, "_tried", set())
    monkeypatch.setattr(bucket_versions, "read_version", swept_once)
    assert bucket_versions.put_version(f"{OUT}/review/marks.parquet", b"1", None)
    assert list(faulty_s3.objects()) == ["out/review/marks.parquet"]


def test_a_folder_passes(tmp_path):
    check_store(str(tmp_path))
    refuse_secrets(str(tmp_path))
    refuse_secrets(f"file://{tmp_path}/a?b@c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["s3://bucket", "s3://bucket/a/b/", "az://container/a", "gs://b/c.d", "memory://b/c", "s3://b/a@b"]
)
def test_a_plain_url_passes(url):
    refuse_secrets(url)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3://AKIAX:hunter22@bucket/corpus", "AWS_SECRET_ACCESS_KEY"),
        ("s3://hunter22@bucket/corpus", "AWS_SECRET_ACCESS_KEY"),
        ("s3://bucket/corpus?X-Amz-Signature=hunter22", "AWS_SECRET_ACCESS_KEY"),
        ("az://container/corpus?sv=2024&sig=hunter22", "AZURE_STORAGE_ACCOUNT_KEY"),
        ("gs://bucket/corpus#hunter22", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("https://user:hunter22@host/corpus", "cannot be written to https://"),
        ("s3a://hunter22@bucket/corpus", "write s3://"),
        ("S3://hunter22@bucket/corpus", "write s3://"),
        ("gcs://bucket/corpus", "write gs://"),
        ("ftp://host/corpus", "give a folder"),
        ("s3:///corpus", "names no bucket"),
        ("s3://", "names no bucket"),
        ("s3://bucket/a//b", "empty part"),
        ("s3://bucket/a/../b", "`..`"),
    ],
)
def test_a_url_that_holds_a_secret_or_names_no_store_is_refused_in_a_line_without_the_secret(url, told):
    with pytest.raises(ConfigError) as caught:
        refuse_secrets(url)
    assert told in str(caught.value)
    assert "hunter22" not in str(caught.value) and "\n" not in str(caught.value)


MARK = f"{OUT}/events/run/begun"


def test_a_node_that_sees_what_the_driver_wrote_and_may_write_passes_and_leaves_nothing(faulty_s3):
    store_of(OUT).put(MARK, b"")
    check_node(OUT, MARK, [])
    assert list(faulty_s3.objects()) == ["out/events/run/begun"]
    assert len(faulty_s3.requests()) <= 5


def test_a_node_without_credentials_is_one_line_with_its_name_and_the_variables(faulty_s3, monkeypatch):
    store_of(OUT).put(MARK, b"")
    names = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
    for name in names:
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError) as raised:
        check_node(OUT, MARK, [*names, "AWS_REGION"])
    line = str(raised.value)
    assert line.startswith(f"node {socket.gethostname()}: {MARK}: no credentials; ") and "\n" not in line
    assert line.endswith(
        "(set where the driver runs, and not on this node: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
    )


def test_a_node_that_may_read_alone_is_refused(faulty_s3):
    store_of(OUT).put(MARK, b"")
    faulty_s3.fail("403", "PUT", count=None)
    with pytest.raises(ConfigError, match=rf"^node .*{PROBE}.*HTTP 403"):
        check_node(OUT, MARK, [])


def test_a_node_that_is_led_to_another_store_is_refused_and_writes_nothing(faulty_s3, monkeypatch):
    store_of(OUT).put(MARK, b"")
    with serving() as other:
        monkeypatch.setenv("AWS_ENDPOINT_URL", other.address)
        with pytest.raises(ConfigError, match="the driver has just written it, and it is not there; let"):
            check_node(OUT, MARK, [])
        assert other.objects() == {}


def test_an_outage_while_a_node_is_looked_at_is_no_verdict(faulty_s3):
    faulty_s3.fail("503", count=None)
    with pytest.raises(OSError, match="HTTP 503"):
        check_node(OUT, MARK, [])
