"""A hundred requests of people who may not look, or write, or who ask for files: each gets its answer."""

import os
import tempfile

import pytest
from starlette.testclient import TestClient

import paracaption
from paracaption.pipeline.explorer import access
from paracaption.pipeline.explorer.app import make_app
from tests.pipeline.explorer import strangers

TOKEN = "a token of the tests"
REVIEW = {"subset": "sa1b", "key": "sa_1", "region": "2", "right": "right"}
LOCAL, OPEN = "http://localhost:8080", "http://somewhere.example"
PICTURE = "/photo/sa1b/sa_1"

HOSTS = [
    *("evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "", "[", "@"),
    *("localhost@evil.example", "evil.example#localhost", "evil.example/localhost", "evil.example?localhost"),
    *("127.0.0.2", "0.0.0.0", "192.168.1.4", "10.0.0.1", "169.254.169.254", "[fe80::1]", "[::ffff:7f00:1]"),
    *("localhost,evil.example", "localhosts", "local host"),
]
ALLOWED_HOSTS = ["localhost", "localhost:1", "LOCALHOST", "localhost.", "127.0.0.1:8080", "[::1]:99"]

WITHOUT_TOKEN = [
    *("/", "/browse", "/whatif", "/review", "/train", "/total", "/image/sa1b/sa_1", PICTURE, "/nowhere"),
    *(
        "/thumb/sa1b/sa_1?r=1",
        "/static/explorer.js",
        "/static/nothing",
        "/distributions/sa1b",
        "/train/picture/0",
    ),
    *("/?token=", "/?token=wrong", "/?token=%00", "/browse?token=a+token+of+the+test", "/?TOKEN=x", "//"),
    *("/?token=a+token+of+the+tests+", "/?token=A+TOKEN+OF+THE+TESTS", "/browse;token=x", "/marks"),
]
WRONG_HEADERS = [
    {"authorization": "Bearer wrong"},
    {"authorization": f"Basic {TOKEN}"},
    {"authorization": f"Bearer  {TOKEN}"},
    {"authorization": TOKEN},
    {"authorization": "Bearer "},
    {"cookie": f"{access.COOKIE}=wrong"},
    {"cookie": f"{access.COOKIE}="},
    {"cookie": f"token={TOKEN}"},
    {"x-forwarded-for": "127.0.0.1"},
    {"host": "localhost"},
    {"x-forwarded-host": "localhost"},
    {"referer": f"{LOCAL}/?token={TOKEN}"},
]

OTHER_SITES = [
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": "http://localhost:9999"},
    {"origin": "http://localhost"},
    {"origin": "http://127.0.0.1:8080"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "none"},
    {"origin": LOCAL, "sec-fetch-site": "cross-site"},
]

FILES = [
    *("/static/..%2f..%2fapp.py", "/static/../app.py", "/static/%2e%2e/app.py", "/static/%2fetc%2fpasswd"),
    *("/photo/sa1b/..%2f..%2fconfig.yaml", "/photo/..%2f..%2f/sa_1", "/photo/%2e%2e/sa_1", "/photo/./sa_1"),
    *(
        "/photo/coconut/..%2f..%2f..%2fprivate.png",
        "/photo/%2fetc/passwd",
        "/photo/sa1b/file:%2f%2f%2fetc%2fpasswd",
    ),
    *("/thumb/sa1b/sa_1%00?r=1", "/thumb/..%2foutside/private?r=1", "/thumb/sa1b/%2fetc%2fpasswd"),
    *(
        "/image/sa1b/%2fetc%2fpasswd",
        "/image/sa1b/sa_1' OR '1'='1",
        "/image/sa1b/sa_1%0d%0aX: y",
        "/image/log/1",
    ),
    *("/image/..%5c..%5cetc/passwd", "/image/coconut/*", "/image/*/sa_1", "/image/sa1b/sa_%3f"),
    *("/train/picture/-1", "/train/picture/99", "/train/picture/..%2f..%2fmetrics.jsonl"),
    *("/browse?after=../../x:0:k:0.0", "/browse?after=sa1b-000000:x:k:0.0", "/distributions/..%2fsa1b"),
    *("/config.yaml", "/log/000000000001.json", "/index.parquet", "/.replaced", "/docs", "/openapi.json"),
]

METHODS = [
    *(
        (method, path)
        for method in ("PUT", "DELETE", "PATCH")
        for path in ("/", PICTURE, "/marks", "/static/x")
    ),
    *(("POST", path) for path in ("/", "/browse", "/image/sa1b/sa_1", PICTURE, "/whatif")),
    *(("GET", "/marks"), ("GET", "/reviewer"), ("TRACE", "/"), ("OPTIONS", "/marks")),
]

REQUESTS = [
    *((None, "GET", "/browse", {"host": host}, 403) for host in HOSTS),
    *((None, "GET", "/total", {"host": host}, 200) for host in ALLOWED_HOSTS),
    *((TOKEN, "GET", path, {}, 401) for path in WITHOUT_TOKEN),
    *((TOKEN, "GET", PICTURE, headers, 401) for headers in WRONG_HEADERS),
    (TOKEN, "POST", "/marks", {}, 401),
    (TOKEN, "GET", "/total", {"authorization": f"Bearer {TOKEN}"}, 200),
    (TOKEN, "POST", "/marks", {"authorization": f"Bearer {TOKEN}", "origin": "http://evil.example"}, 403),
    *((None, "POST", "/marks", headers, 403) for headers in OTHER_SITES),
    *((None, "POST", "/reviewer", headers, 403) for headers in OTHER_SITES[:3]),
    *((None, "GET", path, {}, 404) for path in FILES),
    *((None, method, path, {}, 405) for method, path in METHODS),
]
"""(token of the server, method, path, headers, status)."""


@pytest.fixture(scope="module")
def servers(explorer):
    return {token: make_app(explorer, token) for token in (None, TOKEN)}


def test_there_are_a_hundred_requests():
    assert len(REQUESTS) >= 100


@pytest.mark.parametrize(("token", "method", "path", "headers", "status"), REQUESTS)
@pytest.mark.soak(keep=34)
def test_whoever_may_not_gets_nothing(servers, out, run, tmp_path, token, method, path, headers, status):
    client = TestClient(servers[token], base_url=OPEN if token else LOCAL, follow_redirects=False)
    (tmp_path / "folder").mkdir()
    with strangers.watched(tmp_path) as seen:
        data = REVIEW if method == "POST" else None
        answer = client.request(method, path, headers=headers, data=data)
    allowed = {status, 422} if status == 404 else {status}
    assert answer.status_code in allowed, answer.text[:300]
    if status != 200:
        assert "image/jpeg" not in answer.headers.get("content-type", "") and "root:" not in answer.text
        assert "content-security-policy" in answer.headers and "set-cookie" not in answer.headers
        opened = [each for event, each in seen if event == "open" and os.path.isabs(each)]
        packages = [os.path.dirname(str(each.__file__)) for each in (paracaption, os)]
        spilled = f"{tempfile.gettempdir()}/paracaption-explorer-"  # of an explorer that is garbage by now
        known = (*packages, str(out), str(run), "/proc/", "/dev/null", spilled)
        assert not [each for each in opened if not each.startswith(known) and "site-packages" not in each]
    if status in (401, 403):
        assert not [each for _, each in seen if each.startswith(str(out))]
