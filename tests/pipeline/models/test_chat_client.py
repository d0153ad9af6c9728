"""What a server may send in the place of a chat completion, and what no request can be made of."""

import datetime
import gzip
import time

import pytest

from paracaption.pipeline.models import chat_client
from paracaption.pipeline.models.openai_compatible import OpenAIJudge
from paracaption.pipeline.models.protocols import Answer, Question
from paracaption.schemas.errors import BadRecord, ConfigError, StageFailed
from tests.cases import fuzz_http
from tests.chat_server import Reply, serving

QUESTIONS = [Question("verify", "A dog.", "dog")]


def judge(chat, **options) -> OpenAIJudge:
    return OpenAIJudge(**{"model": "tiny", "base_url": chat.url, "backoff_s": 0.0, **options})


ODD = {
    "deep": {"raw": b"[" * 100_000},
    "flood": {"raw": b" " * (17 << 20)},
    "packed": {"raw": gzip.compress(b"{}"), "headers": {"Content-Encoding": "gzip"}},
    "odd text": {"raw": b"{}", "headers": {"Content-Type": "application/json; charset=zlib"}},
    "odd head": {"text": "no", "status": 500, "headers": {"Retry-After": "9" * 400, "X-Request-Id": "\xff"}},
    "deep answer": {"text": "[" * 100_000},
    "choice": {"raw": b'{"choices": [[{"message": {}}]]}'},
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.soak(keep=5)
def test_an_answer_that_is_no_chat_completion_is_a_reason_that_is_short(kind, monkeypatch):
    monkeypatch.setattr(chat_client, "LONGEST_WAIT_S", 0.5)
    with serving(lambda *_: Reply(**ODD[kind])) as chat:
        found = judge(chat, max_retries=1).ask(QUESTIONS)
    assert len(chat.requests) == 2 and isinstance(found[0], BadRecord) and len(found[0].detail) < 500


def test_a_log_probability_that_no_float_holds_is_no_margin():
    top = [{"token": "yes", "logprob": 10**400}, {"token": "no", "logprob": -1}]
    tokens = [{"token": part, "logprob": 0, "top_logprobs": top} for part in ('{"answer": "', "yes", '"}')]
    with serving(lambda *_: Reply('{"answer": "yes"}', choice={"logprobs": {"content": tokens}})) as chat:
        assert judge(chat).ask(QUESTIONS) == [Answer("yes", None)]


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: ", b""])
@pytest.mark.soak
def test_a_trickle_without_an_end_ends_with_the_time_of_a_request(head):
    with fuzz_http.serving(fuzz_http.Reply(head, trickle=b"x")) as url:
        asked = OpenAIJudge(model="tiny", base_url=url, timeout_s=0.5, max_retries=1, backoff_s=0.0)
        began = time.monotonic()
        with pytest.raises(StageFailed, match=r"failed 2 times: "):
            asked.ask(QUESTIONS)
        with pytest.raises(ConfigError, match="/models does not answer"):
            OpenAIJudge.check(model="tiny", base_url=url, timeout_s=0.5)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("value", [float("nan"), datetime.date(2026, 1, 1)])
def test_a_key_of_the_request_that_json_has_no_form_for_is_refused_at_once(value):
    with pytest.raises(ConfigError, match="extra_body: has a value that JSON has no form for"):
        OpenAIJudge(model="tiny", base_url="http://127.0.0.1:9/v1", extra_body={"a": [value]})


@pytest.mark.parametrize("url", ["http://a:99999/v1", "http://a b/v1", "http://a\x7f/v1", "http://[::1/v1"])
def test_what_is_no_address_is_refused_at_once(url):
    with pytest.raises(ConfigError, match=r"base_url: not an? "):
        OpenAIJudge(model="tiny", base_url=url)
