"""Buckets of corpora: one winner for a name, answers that are lost, errors, and nothing left behind."""

import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from paracaption.pipeline.io import bucket_clients, failures, files, scratch
from paracaption.pipeline.io.buckets import BucketStore, Upload
from paracaption.pipeline.io.failures import Kind, ReadError, classify
from paracaption.pipeline.io.store import store_of
from paracaption.pipeline.io.store_kind import give_up
from paracaption.schemas.errors import ConfigError
from paracaption.schemas.records import Blob

pytest.importorskip("obstore")
STORE = BucketStore()
FAULTY = "s3://corpus/out"


def staged(folder: Path) -> list[Path]:
    return [path for path in (folder / "scratch").rglob("*") if path.is_file()]


# Names, and what lies under them.


def test_what_is_written_is_read_back_whatever_is_in_its_name(bucket_out):
    store, name = store_of(bucket_out), "c [1]{0} %20\u00fc#?&+'.json"
    store.put(f"{bucket_out}/a/b.json", b"hello")
    assert store.create(f"{bucket_out}/a/{name}", b"you")
    assert (store.read(f"{bucket_out}/a/b.json"), store.size(f"{bucket_out}/a/b.json")) == (b"hello", 5)
    assert store.read(f"{bucket_out}/a/{name}") == b"you"
    assert store.list(f"{bucket_out}/a") == ["b.json", name]
    store.put(f"{bucket_out}/a/b.json", b"")
    assert (store.read(f"{bucket_out}/a/b.json"), store.size(f"{bucket_out}/a/b.json")) == (b"", 0)


def test_a_listing_has_files_and_folders_directly_below_and_no_neighbour_with_a_longer_name(bucket_out):
    for name in ("x/one.tar", "x/y/two.tar", "x/y/z/three.tar", "xx/four.tar", "five.json"):
        STORE.put(f"{bucket_out}/{name}", b"1")
    assert STORE.list(bucket_out) == ["five.json", "x", "xx"]
    assert STORE.list(f"{bucket_out}/x") == STORE.list(f"{bucket_out}/x/") == ["one.tar", "y"]
    assert STORE.list(bucket_out.rpartition("/")[0]) == ["corpus"]
    assert STORE.list(f"{bucket_out}/nothing") == []


def test_a_listing_has_the_names_of_all_pages(faulty_s3):
    faulty_s3.set_faults(page_size=3)
    names = [f"{number:02}.json" for number in range(10)]
    for name in names:
        STORE.put(f"{FAULTY}/{name}", b"1")
    assert STORE.list(FAULTY) == names
    STORE.delete_folder(FAULTY)
    assert faulty_s3.objects() == {}


def test_what_is_missing_is_said_to_be_missing(bucket_out):
    assert STORE.size(f"{bucket_out}/none") is None
    assert STORE.size(bucket_out.rpartition("/")[0]) is None  # a bucket is no file
    STORE.delete(f"{bucket_out}/none")
    STORE.delete_folder(f"{bucket_out}/none")
    for ask in (STORE.read, STORE.modified_s):
        with pytest.raises(FileNotFoundError) as caught:
            ask(f"{bucket_out}/none")
        assert caught.value.filename == f"{bucket_out}/none"


def test_what_is_deleted_is_gone_and_its_neighbours_stay(bucket_out):
    for name in ("x/1", "x/y/2", "xx/3", "4"):
        STORE.put(f"{bucket_out}/{name}", b"1")
    STORE.delete(f"{bucket_out}/4")
    STORE.delete_folder(f"{bucket_out}/x")
    assert STORE.list(bucket_out) == ["xx"]


def test_the_store_says_when_a_file_was_written(bucket_out):
    STORE.put(f"{bucket_out}/a", b"1")
    assert abs(STORE.modified_s(f"{bucket_out}/a") - time.time()) < 60


def test_a_new_name_is_nobody_elses_and_keeps_its_ending():
    first, second = (STORE.new_name("s3://b.c/coconut/shards/coconut-000000.tar") for _ in range(2))
    assert first != second
    head, _, nonce = first.removesuffix(".tar").rpartition("-")
    assert head == "s3://b.c/coconut/shards/coconut-000000" and len(nonce) == 12 and int(nonce, 16) >= 0
    assert STORE.new_name("log/.paracaption").startswith("log/.paracaption-")
    assert STORE.new_name("README").startswith("README-")


def test_nothing_is_moved_in_a_bucket(memory_out):
    assert not store_of(memory_out).moves
    for call in (STORE.move, STORE.keep):
        with pytest.raises(AssertionError, match="nothing is moved in a bucket"):
            call(f"{memory_out}/a", f"{memory_out}/b")


# One winner.


@pytest.mark.soak(keep=1)
def test_of_sixteen_threads_one_creates_a_file(bucket_out):
    for turn in range(2):
        path, barrier, won = f"{bucket_out}/{turn}.json", threading.Barrier(16), []

        def create(number: int, path=path, barrier=barrier, won=won) -> None:
            barrier.wait()
            if STORE.create(path, b"%d" % number):
                won.append(number)

        threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert STORE.read(path) == b"%d" % won[0]


def test_a_name_that_is_taken_by_other_content_is_refused_and_stays(bucket_out):
    assert STORE.create(f"{bucket_out}/1.json", b"first")
    assert not STORE.create(f"{bucket_out}/1.json", b"second")
    assert STORE.read(f"{bucket_out}/1.json") == b"first"


@pytest.mark.parametrize("fault", ["lost_answer", "done_500", "repeated", "cut_body", "500", "reset"])
def test_who_created_a_file_learns_it_though_the_answer_was_lost(faulty_s3, fault):
    failures.RETRYING.set_budget(30)  # obstore does not ask again by itself after a reset
    faulty_s3.fail(fault, "PUT")
    assert STORE.create(f"{FAULTY}/1.json", b"first")
    assert not STORE.create(f"{FAULTY}/1.json", b"second")
    assert faulty_s3.content("out/1.json") == b"first"


def test_a_conflict_with_nothing_there_is_tried_again(faulty_s3):
    faulty_s3.fail("409", "PUT", count=3)
    assert STORE.create(f"{FAULTY}/1.json", b"first")
    faulty_s3.fail("409", "PUT", count=None)
    with pytest.raises(ReadError, match="said to be there") as caught:
        STORE.create(f"{FAULTY}/2.json", b"first")
    assert caught.value.kind is Kind.TRANSIENT


# Errors.


def test_what_fails_for_a_while_is_asked_again_within_the_budget(faulty_s3):
    STORE.put(f"{FAULTY}/a", b"1")
    faulty_s3.fail("503", count=9)  # more than obstore tries by itself
    failures.RETRYING.set_budget(30)
    assert STORE.read(f"{FAULTY}/a") == b"1"
    failures.RETRYING.set_budget(0)
    faulty_s3.fail("503", count=None)
    with pytest.raises(ReadError, match=r"s3://corpus/out/a: HTTP 503 Service Unavailable") as caught:
        STORE.read(f"{FAULTY}/a")
    assert caught.value.kind is Kind.TRANSIENT and "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("call", [STORE.read, STORE.size, STORE.list, lambda path: STORE.put(path, b"1")])
def test_who_may_not_is_told_in_one_line_which_variables_to_set(faulty_s3, status, call):
    faulty_s3.fail(str(status), count=None)
    with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID") as caught:
        call(f"{FAULTY}/a")
    assert FAULTY in str(caught.value) and f"HTTP {status}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", [STORE.read, STORE.list, lambda path: STORE.create(path, b"1")])
def test_a_bucket_that_is_not_there_is_one_line(s3_out, call):
    with pytest.raises(ConfigError, match=r"NoSuchBucket.*make the bucket \(AWS_ENDPOINT_URL is") as caught:
        call("s3://nobody-has-this-one/corpus/a")
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (404, "NoSuchBucket", "make the bucket"),
        (400, "ExpiredToken", "no longer valid"),
        (403, "RequestTimeTooSkewed", "set the clock"),
        (400, "AuthorizationHeaderMalformed", "set AWS_REGION to the region of the bucket"),
        (403, "SignatureDoesNotMatch", "correct AWS_ACCESS_KEY_ID"),
        (403, "AccessDenied", "may be read and written"),
    ],
)
def test_each_refusal_says_what_is_to_be_done_about_it(faulty_s3, status, code, told):
    answer = f"Server returned status code: {status} Some Words: <Error><Code>{code}</Code></Error>"
    with pytest.raises(ConfigError, match=told) as caught:
        bucket_clients.insist(lambda calls, _: _refuse(calls, answer), f"{FAULTY}/a")
    assert f"({code})" in str(caught.value)


def _refuse(calls, answer):
    raise calls.exceptions.GenericError(answer)


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
def test_an_address_without_its_scheme_is_told_and_not_asked(monkeypatch, s3_out, name):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv(name, "127.0.0.1:9000")  # obstore would end with a panic
    with pytest.raises(ConfigError, match=f"{name} is no address; begin it with http://"):
        STORE.read(f"{s3_out}/a")


@pytest.mark.parametrize("value", ["hunter22\n", " hunter22", "hunter22\r"])
def test_a_secret_with_a_line_break_is_told_by_its_name(monkeypatch, s3_out, value):
    monkeypatch.setenv("AWS_SESSION_TOKEN", value)  # no HTTP header could have it
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    with pytest.raises(ConfigError, match="AWS_SESSION_TOKEN begins or ends with a space") as caught:
        STORE.read(f"{s3_out}/a")
    assert "hunter22" not in str(caught.value)


def test_a_store_that_cannot_be_reached_is_transient(monkeypatch, s3_out):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(ReadError) as caught:
        STORE.read(f"{s3_out}/a")
    assert caught.value.kind is Kind.TRANSIENT
    assert str(caught.value) == f"{s3_out}/a: no answer from http://127.0.0.1:1 (Connection refused)"


def test_a_connection_that_breaks_is_a_short_line(faulty_s3):
    faulty_s3.fail("reset", count=None)
    with pytest.raises(ReadError, match=rf"^{FAULTY}/a: no answer from {faulty_s3.address} \([^()]+\)$"):
        STORE.read(f"{FAULTY}/a")


def test_an_account_that_is_missing_names_the_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AZURE")]:
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        store_of("az://container/corpus").read("az://container/corpus/a")


def test_a_machine_whose_credentials_are_renewed_with_difficulty_is_not_one_without_credentials(memory_out):
    """Only who has none is asked for them; who had an answer before has some."""
    from obstore.exceptions import GenericError

    def renew(calls, client):
        raise GenericError("error sending request for url (http://169.254.169.254/latest/api/token): timeout")

    with pytest.raises(ConfigError, match="no credentials"):
        bucket_clients.ask(renew, f"{memory_out}/a")
    STORE.put(f"{memory_out}/a", b"1")
    with pytest.raises(bucket_clients.BucketError) as caught:
        bucket_clients.ask(renew, f"{memory_out}/a")
    assert classify(caught.value) is Kind.TRANSIENT


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    for call in (STORE.read, STORE.delete, STORE.list, lambda path: STORE.put(path, b"1")):
        with pytest.raises(ConfigError, match=r"obstore .* is not installed; .*extra `remote`"):
            call("memory://nobody-opened-this-one/a")


def test_a_scheme_that_no_store_writes_is_refused():
    with pytest.raises(ConfigError, match="cannot be written to ftp://"):
        store_of("ftp://host/corpus")


# Files that are uploaded when they are closed.


@pytest.mark.parametrize("num_bytes", [0, 10, scratch.IN_MEMORY_BYTES + 1, 20 << 20])
@pytest.mark.soak(keep=5)
def test_a_file_is_there_when_it_is_closed_and_its_scratch_is_empty(bucket_out, tmp_path, num_bytes):
    data = os.urandom(num_bytes)
    with STORE.write(f"{bucket_out}/shards/a.tar") as file:
        for start in range(0, num_bytes, 3 << 20):
            file.write(memoryview(data)[start : start + (3 << 20)])
        assert file.tell() == num_bytes
        assert bool(staged(tmp_path)) == (num_bytes > scratch.IN_MEMORY_BYTES)
        assert STORE.size(f"{bucket_out}/shards/a.tar") is None
    assert STORE.read(f"{bucket_out}/shards/a.tar") == data
    assert staged(tmp_path) == []
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.write(b"1")


def fail(file) -> None:
    with file:
        raise RuntimeError


@pytest.mark.parametrize("give", [give_up, fail, Upload.__del__])
@pytest.mark.parametrize("num_bytes", [10, scratch.IN_MEMORY_BYTES + 1])
def test_a_file_that_is_given_up_leaves_nothing(bucket_out, tmp_path, give, num_bytes):
    file = STORE.write(f"{bucket_out}/a.tar")
    file.write(bytes(num_bytes))
    try:
        give(file)
    except RuntimeError:
        pass
    file.close()
    assert STORE.list(bucket_out) == [] and staged(tmp_path) == []


def test_a_file_that_is_forgotten_leaves_nothing(bucket_out, tmp_path):
    file = STORE.write(f"{bucket_out}/a.tar")
    file.write(bytes(scratch.IN_MEMORY_BYTES + 1))
    assert len(staged(tmp_path)) == 1
    del file
    assert STORE.list(bucket_out) == [] and staged(tmp_path) == []


def test_a_file_that_does_not_arrive_is_an_error_and_leaves_no_scratch(faulty_s3, tmp_path):
    file = STORE.write(f"{FAULTY}/a.tar")
    file.write(bytes(scratch.IN_MEMORY_BYTES + 1))
    faulty_s3.fail("503", count=None)
    with pytest.raises(ReadError, match="HTTP 503"):
        file.close()
    assert file.closed and staged(tmp_path) == []


def test_an_upload_whose_last_answer_is_lost_is_made_again(faulty_s3):
    faulty_s3.set_faults(forgets_uploads=True)
    faulty_s3.fail("lost_answer", "CompleteMultipartUpload")
    failures.RETRYING.set_budget(30)
    data = os.urandom(12 << 20)
    with STORE.write(f"{FAULTY}/a.tar") as file:
        file.write(data)
    assert faulty_s3.content("out/a.tar") == data


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.soak(keep=1)
def test_a_fifth_of_all_requests_may_fail(faulty_s3, seed):
    failures.RETRYING.set_budget(60)
    faults = ("500", "503", "lost_answer", "reset", "done_500", "repeated", "cut_body")
    faulty_s3.set_faults(shares=dict.fromkeys(faults, 0.03), seed=seed)
    big = os.urandom(11 << 20)
    for number in range(15):
        assert STORE.create(f"{FAULTY}/log/{number}.json", b"%d" % number)
        assert not STORE.create(f"{FAULTY}/log/{number}.json", b"other")
    with STORE.write(f"{FAULTY}/big.tar") as file:
        file.write(big)
    assert STORE.read(f"{FAULTY}/big.tar") == big
    assert len(STORE.list(f"{FAULTY}/log")) == 15
    STORE.delete_folder(FAULTY)
    assert faulty_s3.objects() == {}


# Processes.


def test_a_store_is_pickled_without_a_client_or_a_secret(s3_out, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter22")
    store_of(s3_out).put(f"{s3_out}/a", b"1")
    raw = pickle.dumps(store_of(s3_out))
    assert len(raw) < 200 and b"hunter22" not in raw


_FORKING = """
import os
from paracaption.pipeline.io.store import store_of
from paracaption.schemas.errors import ConfigError
store = store_of("memory://b/corpus")
if {used}:
    store.put("memory://b/corpus/a", b"1")
if not os.fork():
    try:
        store.put("memory://b/corpus/b", b"1")
    except ConfigError as error:
        assert "spawn" in str(error)
        os._exit(7)
    os._exit(8)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize(("used", "code"), [(True, "7"), (False, "8")])
def test_a_process_that_was_forked_after_a_bucket_was_used_is_refused_and_does_not_hang(used, code):
    command = [sys.executable, "-c", _FORKING.format(used=used)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == code, done.stderr


def test_naming_a_place_imports_nothing():
    code = (
        "import sys; from paracaption.pipeline.io.store import store_of; store_of('s3://b/c'); "
        "assert not {'obstore', 'fsspec', 's3fs'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_client_is_made_once_for_a_bucket_and_anew_for_another_address(s3_out, monkeypatch):
    first = bucket_clients.client_of(bucket_clients.place_of(f"{s3_out}/a"))
    assert bucket_clients.client_of(bucket_clients.place_of(f"{s3_out}/b/c")) is first
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert bucket_clients.client_of(bucket_clients.place_of(f"{s3_out}/a")) is not first


def test_a_variable_in_the_url_is_put_in(memory_out, monkeypatch):
    from paracaption.pipeline.io import variables

    monkeypatch.setattr(variables, "_taken", {})
    monkeypatch.setenv("PLACE", memory_out)
    path = variables.take("${PLACE}/a")
    store_of(path).put(path, b"1")
    assert files.read(Blob(path)) == STORE.read(f"{memory_out}/a") == b"1"
