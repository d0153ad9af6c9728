"""Who may read and write, and that nothing in a request leads to a file."""

import html
from html.parser import HTMLParser
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from paracaption.pipeline.explorer import access
from paracaption.pipeline.explorer.app import Explorer, make_app
from paracaption.pipeline.explorer.reviews import Reviews
from tests.pipeline.explorer.corpus import HOSTILE

TOKEN = "a token of the tests"
REVIEW = {"subset": "sa1b", "key": "sa_1", "region": "2", "right": "right"}


@pytest.fixture
def guarded(explorer) -> TestClient:
    return TestClient(make_app(explorer, TOKEN), base_url="http://somewhere.example")


def test_loopback_is_told_from_the_rest():
    assert all(map(access.is_loopback, ("127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]")))
    assert not any(map(access.is_loopback, ("0.0.0.0", "::", "192.168.1.4", "localhost.evil.example", "")))


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8080", "", "[", "@"]
)
def test_without_a_token_only_names_of_this_machine_are_answered(client, host):
    assert client.get("/", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8080", "[::1]:99", "LOCALHOST:1"])
def test_names_of_this_machine_are_answered(client, host):
    assert client.get("/total", headers={"host": host}).status_code == 200


def test_with_a_token_every_request_needs_it(guarded):
    for path in (
        "/",
        "/browse",
        "/photo/sa1b/sa_1",
        "/static/explorer.js",
        "/nowhere",
        "/?token=",
        "/?token=wrong",
    ):
        assert guarded.get(path).status_code == 401, path
    assert guarded.post("/marks", data=REVIEW).status_code == 401
    assert guarded.get("/", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert guarded.get("/", headers={"cookie": f"{access.COOKIE}=wrong"}).status_code == 401


def test_the_token_moves_from_the_address_into_a_cookie(guarded):
    answer = guarded.get("/browse", params={"token": TOKEN, "text": "a&b"}, follow_redirects=False)
    assert answer.status_code == 303 and answer.headers["location"] == "/browse?text=a%26b"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie
    assert guarded.get("/browse").status_code == 200
    away = guarded.get(
        f"http://somewhere.example//evil.example/?token={quote(TOKEN)}", follow_redirects=False
    )
    assert away.headers["location"] == "/evil.example/"


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:9999"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "http://localhost:8080", "sec-fetch-site": "none"},
    ],
)
@pytest.mark.soak(keep=3)
def test_another_site_cannot_review(client, out, headers):
    before = Reviews(Explorer(out).catalog).read_all()
    assert client.post("/marks", data=REVIEW, headers=headers).status_code == 403
    assert Reviews(Explorer(out).catalog).read_all() == before


def test_only_reviews_are_written_and_only_by_post(client):
    assert client.get("/marks", params=REVIEW).status_code == 405
    for method in ("PUT", "DELETE", "PATCH", "POST"):
        for path in ("/", "/browse", "/image/sa1b/sa_1", "/photo/sa1b/sa_1"):
            assert client.request(method, path).status_code == 405, (method, path)
    for broken in ({"right": "maybe"}, {"region": "x"}, {"key": "../../etc/passwd"}, {"subset": ".."}):
        assert client.post("/marks", data=REVIEW | broken).status_code in (404, 422), broken


@pytest.mark.parametrize(
    "path",
    [
        "/static/..%2f..%2fserver.py",
        "/static/../server.py",
        "/photo/sa1b/..%2f..%2fconfig.yaml",
        "/photo/..%2f..%2f/sa_1",
        "/photo/%2e%2e/sa_1",
        "/thumb/sa1b/sa_1%00?r=1",
        "/image/sa1b/%2fetc%2fpasswd",
        "/image/sa1b/sa_1' OR '1'='1",
        "/train/picture/-1",
        "/train/picture/99",
        "/train/picture/..%2f..%2fmetrics.jsonl",
        "/browse?after=../../x:0:k:0.0",
    ],
)
def test_no_path_of_a_request_reaches_the_file_system(client, monkeypatch, path):
    from paracaption.pipeline.io import files

    monkeypatch.setattr(files, "read", lambda *_: pytest.fail("a file was read"))
    assert client.get(path).status_code in (404, 422)


@pytest.mark.parametrize(
    "path", ["/", "/browse", "/image/coconut/000000000001", "/static/explorer.js", "/nowhere"]
)
def test_every_answer_has_the_headers_that_confine_it(client, path):
    headers = client.get(path).headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


_S = "%3Cscript%3E"


@pytest.mark.parametrize(
    "path",
    ["/browse?text=script", "/image/coconut/000000000001", f"/browse?text={_S}x", "/train", "/whatif",
     "/review", f"/browse?category=%22%3E{_S}", f"/image/coconut/{_S}", f"/whatif?min_iou={_S}",
     f"/browse?sort={_S}", f"/review?decision={_S}&subset=coconut", f"/browse?iou.min={_S}"],
)  # fmt: skip
@pytest.mark.soak(keep=3)
def test_what_models_strangers_and_addresses_say_is_text(client, path):
    found = Elements()
    found.feed(client.get(path).text)
    assert [attributes for tag, attributes in found.all if tag == "script"] == [
        {"src": "/static/explorer.js", "defer": None}
    ]
    assert not [tag for tag, _ in found.all if tag in ("i", "iframe", "object", "style", "base")]
    for tag, attributes in found.all:
        assert not [name for name in attributes if name == "style" or name.startswith("on")], tag
        assert attributes.get("src", "/").startswith("/"), tag


class Elements(HTMLParser):
    """Tags of a page with their attributes, as a browser sees them."""

    def __init__(self):
        super().__init__()
        self.all: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attributes):
        self.all.append((tag, dict(attributes)))


def test_the_hostile_caption_is_shown_as_it_is(client):
    assert (
        html.escape(HOSTILE).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")
        in client.get("/image/coconut/000000000001").text
    )
