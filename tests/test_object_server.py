"""The S3 server of the tests: it does what S3 does, and each fault does what it says."""

from __future__ import annotations

import http.client
import io
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from obstore.exceptions import AlreadyExistsError, GenericError, PermissionDeniedError, PreconditionError
from obstore.store import S3Store, from_url

from tests.object_server import ObjectServer, control, serving
from tests.servers import race, set_environment

if TYPE_CHECKING:
    from obstore.store import RetryConfig

ROOT = Path(__file__).resolve().parents[1]
QUICKLY: RetryConfig = {
    "max_retries": 10,
    "retry_timeout": timedelta(seconds=30),
    "backoff": {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=20)},
}
ONCE: RetryConfig = {"max_retries": 0, "retry_timeout": timedelta(seconds=30)}


@pytest.fixture
def server(monkeypatch):
    with serving() as server:
        set_environment(monkeypatch, server.environment)
        yield server


def store(retry: RetryConfig = ONCE) -> S3Store:
    """Of the bucket `corpus` of the server that the environment names."""
    return S3Store("corpus", retry_config=retry)


def asked(server: ObjectServer, *fields: str) -> list[tuple]:
    return [tuple(each[field] for field in fields) for each in server.requests()]


def listed(bucket: S3Store, prefix: str = "") -> list[str]:
    return [each["path"] for page in bucket.list(prefix) for each in page]


def test_the_environment_is_all_that_obstore_needs(server):
    bucket = from_url("s3://corpus/below")
    bucket.put("a", b"abc")
    assert server.objects() == {"below/a": 3} and server.content("below/a") == b"abc"


def test_a_conditional_put_has_one_winner_of_sixteen(server):
    bucket = store(QUICKLY)
    for number in range(20):
        assert race(bucket, f"log/{number}") == [server.content(f"log/{number}")]


def test_without_conditions_all_sixteen_win(server):
    server.set_faults(ignores_conditions=True)
    assert len(race(store(QUICKLY), "log/0")) == 16


def test_if_match_replaces_only_what_it_names(server):
    bucket = store()
    first = bucket.put("a", b"1")
    bucket.put("a", b"2", mode={"e_tag": first["e_tag"]})
    with pytest.raises(PreconditionError):
        bucket.put("a", b"3", mode={"e_tag": first["e_tag"]})
    with pytest.raises(PreconditionError):
        bucket.put("none", b"3", mode={"e_tag": first["e_tag"]})
    assert server.content("a") == b"2"


def test_ranges_and_their_limits(server):
    bucket = store()
    bucket.put("a", b"0123456789")
    assert bytes(bucket.get_range("a", start=2, end=5)) == b"234"
    assert bytes(bucket.get("a", options={"range": {"suffix": 3}}).bytes()) == b"789"
    assert bytes(bucket.get("a", options={"range": {"offset": 8}}).bytes()) == b"89"
    assert bytes(bucket.get_range("a", start=8, end=50)) == b"89"
    with pytest.raises(GenericError, match="416"):
        bucket.get_range("a", start=10, end=11)
    with pytest.raises(FileNotFoundError):
        bucket.head("b")


def test_a_listing_has_pages_prefixes_and_offsets(server):
    bucket = store()
    keys = [f"{folder}/{number:02d} <&ü%.tar" for folder in ("a", "b/c", "b/d") for number in range(5)]
    for key in [*keys, "b.txt", "b0"]:
        bucket.put(key, b"")
    server.set_faults(page_size=2)
    server.forget_requests()
    assert listed(bucket) == sorted([*keys, "b.txt", "b0"])
    assert server.counts()["requests"] == {"ListObjectsV2": 9}
    assert listed(bucket, "b/c/") == keys[5:10]
    below = bucket.list_with_delimiter()
    assert below["common_prefixes"] == ["a", "b"]
    assert [each["path"] for each in below["objects"]] == ["b.txt", "b0"]
    assert bucket.list_with_delimiter("b/")["common_prefixes"] == ["b/c", "b/d"]
    later = [each["path"] for page in bucket.list(offset=keys[12]) for each in page]
    assert later == [*keys[13:], "b0"]


def test_a_multipart_upload_is_there_when_it_is_complete(server):
    content = bytes(range(256)) * 50_000
    gate = server.gate("CompleteMultipartUpload")
    with ThreadPoolExecutor(1) as thread:
        put = thread.submit(store().put, "big", content, chunk_size=5 << 20)
        server.held(gate, wait_s=10)
        assert server.objects() == {} and list(server.uploads().values()) == ["big"]
        server.release(gate)
        etag = put.result()["e_tag"]
    assert server.content("big") == content and server.uploads() == {}
    assert etag and etag.endswith('-3"') and store().head("big")["e_tag"] == etag
    assert server.counts()["requests"]["UploadPart"] == 3


def test_a_part_below_five_mebibytes_is_refused_unless_it_is_the_last(server):
    with pytest.raises(GenericError, match="EntityTooSmall"):
        store().put("big", bytes(6 << 20), chunk_size=1 << 20)
    assert server.objects() == {}


def test_a_bulk_delete_names_its_keys_in_the_log(server):
    bucket = store()
    for name in ("a", "b", "c"):
        bucket.put(name, b"")
    bucket.delete(["a", "b", "missing"])
    assert list(server.objects()) == ["c"]
    assert asked(server, "operation", "keys")[-1] == ("DeleteObjects", ["a", "b", "missing"])


def test_boto3_and_s3fs_use_it_too(server):
    import boto3
    import s3fs

    client = boto3.client("s3", endpoint_url=server.address)
    client.put_object(Bucket="corpus", Key="ü &<>", Body=io.BytesIO(b"stream"), Metadata={"by": "us"})
    got = client.get_object(Bucket="corpus", Key="ü &<>", Range="bytes=-3")
    assert (got["Body"].read(), got["Metadata"]) == (b"eam", {"by": "us"})
    upload = client.create_multipart_upload(Bucket="corpus", Key="left")["UploadId"]
    assert [each["Key"] for each in client.list_multipart_uploads(Bucket="corpus")["Uploads"]] == ["left"]
    client.abort_multipart_upload(Bucket="corpus", Key="left", UploadId=upload)
    assert server.uploads() == {}
    with pytest.raises(client.exceptions.NoSuchBucket):
        client.list_objects_v2(Bucket="none")
    files = s3fs.S3FileSystem(endpoint_url=server.address, skip_instance_cache=True)
    with files.open("corpus/shards/a b.tar", "wb") as file:
        file.write(b"q" * 6_000_000)
    assert files.cat_file("corpus/shards/a b.tar", start=5, end=9) == b"qqqq"
    files.cp("corpus/shards/a b.tar", "corpus/shards/c.tar")
    assert files.ls("corpus/shards") == ["corpus/shards/a b.tar", "corpus/shards/c.tar"]
    files.rm("corpus/shards", recursive=True)
    assert list(server.objects()) == ["ü &<>"]


@pytest.mark.parametrize("status", ["500", "503", "403"])
def test_a_status_is_answered_and_nothing_is_done(server, status):
    server.set_faults(shares={status: 1.0})
    with pytest.raises((GenericError, PermissionDeniedError), match=f"{status} "):
        store().put("a", b"1")
    assert server.objects() == {} and server.counts()["faults"] == {status: 1}


def test_a_conflict_hits_only_conditional_puts(server):
    server.set_faults(shares={"409": 1.0})
    store().put("a", b"1")
    with pytest.raises(AlreadyExistsError):
        store().put("b", b"1", mode="create")
    assert list(server.objects()) == ["a"]


def test_a_reset_comes_before_anything_is_done(server):
    server.set_faults(shares={"reset": 1.0})
    with pytest.raises(GenericError):
        store().put("a", b"1")
    assert server.objects() == {} and asked(server, "fault", "status") == [("reset", 0)]


def test_a_lost_answer_is_a_false_conflict_for_a_client_that_tries_again(server):
    server.fail("lost_answer", "PutObject", "log/*")
    with pytest.raises(AlreadyExistsError):
        store(QUICKLY).put("log/1", b"mine", mode="create")
    assert server.content("log/1") == b"mine"
    assert asked(server, "fault", "status") == [("lost_answer", 0), ("", 412)]


def test_done_and_then_answered_by_500(server):
    server.fail("done_500")
    with pytest.raises(GenericError, match="500"):
        store().put("a", b"1")
    assert list(server.objects()) == ["a"]


def test_a_repeated_request_is_done_twice(server):
    server.fail("repeated", "PUT")
    with pytest.raises(AlreadyExistsError):
        store().put("a", b"1", mode="create")
    assert server.content("a") == b"1"
    server.fail("repeated", "CreateMultipartUpload")
    store().put("big", bytes(6 << 20), chunk_size=5 << 20)
    assert len(server.objects()) == 2 and list(server.uploads().values()) == ["big"], "one was left behind"


@pytest.mark.parametrize("fault", ["stuck", "repeated_late"])
def test_a_late_request_overwrites_what_came_after_it(server, fault):
    server.set_faults(later_s=0.2)
    server.fail(fault, "PUT", "beat/*")
    store(QUICKLY).put("beat/1", b"old")
    store(QUICKLY).put("beat/1", b"new")
    assert server.content("beat/1") == b"new"
    time.sleep(0.4)
    assert server.content("beat/1") == b"old"


def test_a_slow_body_takes_its_time(server):
    store().put("a", b"0123456789")
    server.set_faults(shares={"slow_body": 1.0}, slow_s=0.3)
    began = time.monotonic()
    assert bytes(store().get("a").bytes()) == b"0123456789"
    assert time.monotonic() - began > 0.29


def test_a_cut_body_is_shorter_than_announced(server):
    store().put("a", b"0123456789")
    server.set_faults(shares={"cut_body": 1.0})
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/corpus/a")
    response = connection.getresponse()
    assert response.headers["Content-Length"] == "10"
    with pytest.raises(http.client.IncompleteRead) as caught:
        response.read()
    assert caught.value.partial == b"01234"
    store().put("b", b"")  # no body to cut
    assert server.counts()["faults"] == {"cut_body": 1}


def test_shares_are_met_and_a_seed_meets_the_same_requests_again(server):
    shares = {"500": 0.1, "reset": 0.1, "lost_answer": 0.1}

    bucket = store()

    def faults(seed: int) -> list[str]:
        server.set_faults(shares=shares, seed=seed)
        server.forget_requests()
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda n: _tried(bucket, f"k{n}"), range(300)))
        return [fault for _, fault in sorted(asked(server, "keys", "fault"))]

    first, other = faults(1), faults(2)
    assert first == faults(1) and first != other
    for name in shares:
        assert 12 < first.count(name) < 60, name


def _tried(bucket: S3Store, key: str) -> None:
    try:
        bucket.put(key, b"")
    except GenericError:
        return


def test_a_client_with_patience_loses_nothing_to_a_fifth_of_faults(server):
    shares = {"500": 0.04, "503": 0.04, "reset": 0.04, "lost_answer": 0.04, "cut_body": 0.04}
    server.set_faults(shares=shares, seed=3)
    bucket = store(QUICKLY)
    for number in range(100):
        bucket.put(f"k{number}", b"%d" % number)
        assert bytes(bucket.get(f"k{number}").bytes()) == b"%d" % number
    assert server.counts()["faults"].keys() == shares.keys()


def test_faults_of_some_keys_spare_the_others(server):
    server.set_faults(shares={"503": 1.0}, keys="log/*")
    store().put("shards/1.tar", b"")
    with pytest.raises(GenericError):
        store().put("log/1", b"")


def test_a_late_listing_lacks_what_is_new_but_reads_see_it(server):
    bucket = store()
    for number in range(5):
        bucket.put(f"log/{number}", b"")
    server.set_faults(late_listing_puts=2)
    bucket.put("log/0", b"")  # has long been there
    bucket.put("log/5", b"")
    assert listed(bucket, "log") == [f"log/{number}" for number in range(5)]
    assert bucket.head("log/5")["size"] == 0
    server.set_faults(late_listing_puts=0, late_listing_s=0.5)
    bucket.put("log/6", b"")
    assert "log/6" not in listed(bucket, "log")
    time.sleep(0.6)
    assert listed(bucket, "log") == [f"log/{number}" for number in range(7)]


def test_a_second_complete_is_answered_again_or_refused(server):
    for forgets in (False, True):
        server.set_faults(forgets_uploads=forgets)
        server.fail("lost_answer", "CompleteMultipartUpload")
        if forgets:
            with pytest.raises(FileNotFoundError, match="NoSuchUpload"):
                store(QUICKLY).put(f"big-{forgets}", bytes(6 << 20), chunk_size=5 << 20)
        else:
            store(QUICKLY).put(f"big-{forgets}", bytes(6 << 20), chunk_size=5 << 20)
        assert server.objects()[f"big-{forgets}"] == 6 << 20


@pytest.mark.parametrize("hold", ["before", "after"])
def test_a_gate_stops_one_request_before_or_after_it_is_done(server, hold):
    gate = server.gate("PUT", "log/*", hold)
    bucket = store()
    with ThreadPoolExecutor(1) as thread:
        put = thread.submit(bucket.put, "log/1", b"held")
        [number] = server.held(gate, wait_s=10)
        assert server.requests()[number]["keys"] == ["log/1"]
        assert list(server.objects()) == (["log/1"] if hold == "after" else [])
        bucket.put("log/2", b"passes")  # the gate was for one
        bucket.put("shards/1.tar", b"passes")
        assert not put.done()
        server.release(gate)
        put.result()
    assert list(server.objects()) == ["log/1", "log/2", "shards/1.tar"]


def test_the_request_of_a_killed_client_is_done_when_the_gate_opens(server):
    gate = server.gate("PutObject", "log/1")
    code = "from obstore.store import S3Store; S3Store('corpus').put('log/1', b'late', mode='create')"
    client = subprocess.Popen([sys.executable, "-c", code])
    server.held(gate, wait_s=30)
    client.kill()
    client.wait()
    assert server.objects() == {}
    server.release(gate)
    deadline = time.monotonic() + 10
    while not server.objects() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.content("log/1") == b"late"


def test_half_an_upload_is_nothing(server):
    import socket

    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"PUT /corpus/a HTTP/1.1\r\nContent-Length: 10\r\n\r\n12345")
    store().put("b", b"")
    assert list(server.objects()) == ["b"]


def test_another_process_serves_and_is_controlled(monkeypatch):
    command = [sys.executable, "-m", "tests.object_server", "--bucket", "other"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().strip()
            bucket = S3Store(
                "other", endpoint=address, client_options={"allow_http": True}, skip_signature=True
            )
            bucket.put("a", b"123")
            assert control(address, "objects", bucket="other") == {"a": 3}
            control(address, "set_faults", shares={"404": 1.0})
            with pytest.raises(FileNotFoundError):
                bucket.get("a")
            control(address, "set_faults", shares={})
            gate = control(address, "gate", kind="GET")
            with ThreadPoolExecutor(1) as thread:
                got = thread.submit(bucket.get, "a")
                assert len(control(address, "held", gate=gate, wait_s=10)) == 1
                control(address, "release", gate=gate)
                got.result()
            assert control(address, "counts")["requests"] == {"PutObject": 1, "GetObject": 2}
            with pytest.raises(ValueError, match="unknown fault 'late'; choose a status"):
                control(address, "set_faults", shares={"late": 0.1})
        finally:
            process.kill()


def test_a_stopped_server_answers_nothing_more():
    with serving() as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("HEAD", "/corpus")
        assert connection.getresponse().read() == b""
    with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
        connection.request("HEAD", "/corpus")
        connection.getresponse()


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("cut_body", "ListObjectsV2"),
        ("cut_body", "DeleteObjects"),
        ("cut_body", "CreateMultipartUpload"),
        ("cut_body", "CompleteMultipartUpload"),
        ("reset", "DeleteObjects"),
    ],
)
def test_obstore_itself_does_not_try_these_again(server, fault, kind):
    """Whoever uses it must. After a cut answer to "complete" it even raises "not found" for what is there."""
    bucket = store(QUICKLY)
    requests = {
        "ListObjectsV2": lambda: listed(bucket),
        "DeleteObjects": lambda: bucket.delete("a"),
        "CreateMultipartUpload": lambda: bucket.put("big", bytes(6 << 20)),
    }
    requests["CompleteMultipartUpload"] = requests["CreateMultipartUpload"]
    server.fail(fault, kind)
    missing = kind == "CompleteMultipartUpload"
    with pytest.raises(FileNotFoundError if missing else GenericError):
        requests[kind]()
    assert server.counts()["requests"][kind] == 1
    assert list(server.objects()) == (["big"] if missing else [])
    requests[kind]()
