"""Asks an OpenAI-compatible server many things at once: bounded, patient, and silent about the key.

| the server says | happens |
| --- | --- |
| 429, 5xx, no answer in time, no connection | again, with a growing wait or as `Retry-After` has it |
| the same after all retries, but it lists its models | `BadRecord(MODEL_ERROR)`: this request's fault |
| the same after all retries, 429 or no list | `StageFailed`: the build stops, nothing is dropped for it |
| 401, 403, 404 | `StageFailed` at once: the set-up's fault |
| 400, 413, 422 and the like | `BadRecord(MODEL_ERROR)` at once: this request's fault |
| something else than a chat completion, more than 16 MiB, a trickle without an end | again, as 5xx |
| an answer outside its schema | again, less greedily, twice; then `BadRecord(ANSWER_INVALID)` |

The key is read from the environment when a batch starts and lives in the connection's header only. It is
removed from whatever a server or a library reports before that goes into an error or a log.
"""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import json
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from ...schemas.errors import BadRecord, ConfigError, StageFailed
from ...schemas.reasons import Reason
from .options import BackendOptions

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

LONGEST_WAIT_S = 60.0
"""Between two tries, whatever `Retry-After` asks for."""

INVALID_RETRIES = 2
RETRY_TEMPERATURE = 0.7
"""After an answer outside its schema: the same request again would get the same answer."""

_TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_SETUP = frozenset({401, 403, 404, 405})
_MAX_TEXT = 200
_SECRET_LENGTH = 8
_MAX_BYTES = 16 << 20
_HEADERS = (b"x-request-id", b"retry-after")
"""What is read of an answer's headers; the text of every answer is UTF-8, as JSON is."""


class ServerOptions(BackendOptions, frozen=True, kw_only=True):
    """The options of both `openai` backends.

    Attributes:
        model: the name under which the server has the model.
        base_url: of the server's API, such as "http://host:8000/v1".
        revision: raise it when the model behind the name has changed; part of the evidence digest.
        api_key_env: environment variable that holds the key, on every node; if it is unset, no key is sent.
        max_concurrency: requests at once.
        timeout_s: seconds for one request, to the end of its answer.
        max_retries: of one request.
        backoff_s: wait before the first retry; it doubles with each retry, and half of it is random.
        max_tokens: of an answer; None for the prompt's own limit.
        temperature: 0 is greedy.
        extra_body: more keys of the request, such as {chat_template_kwargs: {enable_thinking: false}}; a key
            of ours is removed by null.
    """

    model: Annotated[str, Meta(min_length=1)]
    base_url: str
    revision: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    max_concurrency: Annotated[int, Meta(ge=1)] = 32
    timeout_s: Annotated[float, Meta(gt=0)] = 120.0
    max_retries: Annotated[int, Meta(ge=0)] = 6
    backoff_s: Annotated[float, Meta(ge=0)] = 1.0
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0)] = 0.0
    extra_body: dict[str, Any] = {}

    def identity(self) -> dict[str, str]:
        """The options that change answers."""
        return {
            "model": self.model,
            "revision": self.revision,
            "generation": f"temperature {self.temperature:g}, max_tokens {self.max_tokens}",
            "extra_body": msgspec.json.encode(self.extra_body, order="deterministic").decode(),
        }

    def check(self, where: str) -> None:
        """Refuse what would write a key down or cannot be a server. No message shows the value."""
        try:
            url = urlsplit(self.base_url)
            usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
            usable = usable and self.base_url.isprintable() and " " not in self.base_url
        except ValueError:
            raise ConfigError(f"{where}.base_url: not a URL; name one such as http://host:8000/v1") from None
        if url.username or url.password or url.query:
            raise ConfigError(
                f"{where}.base_url: holds a name, a password or a query, which would end up in the output; "
                f"put the key into the environment and its name into {where}.api_key_env"
            )
        if not usable:
            raise ConfigError(f"{where}.base_url: not an http(s) URL; name one such as http://host:8000/v1")
        if not self.api_key_env.replace("_", "a").isalnum() or self.api_key_env[:1].isdigit():
            raise ConfigError(
                f"{where}.api_key_env: not the name of an environment variable; put the key into a "
                "variable, and give its name here"
            )
        if any("key" in name.lower() or "auth" in name.lower() for name in self.extra_body):
            raise ConfigError(
                f"{where}.extra_body: a key must not stand here; put it into the variable of api_key_env"
            )
        try:
            json.dumps(self.extra_body, allow_nan=False)
        except (TypeError, ValueError):
            raise ConfigError(
                f"{where}.extra_body: has a value that JSON has no form for, such as a date or .nan; "
                "write it as text"
            ) from None


class Ask(NamedTuple):
    """One request: what it is about, its body without the model's name, and how its own answer is read."""

    index: int
    body: dict[str, Any]
    read: Any = None


class ChatClient:
    """One server and one model. Cheap to make: it opens its connections for each batch.

    Args:
        options: of the server, checked.
        where: what messages call the options, such as "judge.options".
    """

    def __init__(self, options: ServerOptions, where: str):
        self.options = options
        self.where = where
        self.url = options.base_url.rstrip("/")
        self.num_retries = 0
        self.num_requests = 0

    def run(self, asks: Iterator[Ask], read: Any) -> dict[int, Any]:
        """Ask everything, at most `max_concurrency` at once.

        Args:
            asks: drawn one at a time in a thread of its own, only while a place is free.
            read: `choice -> result` for the first choice of an answer; it may raise `BadRecord` for an answer
                outside its schema, which is asked for again. A request may have a `read` of its own.

        Returns:
            By index: the result, or the `BadRecord` of a request that has none.

        Raises:
            StageFailed: the server is down, refuses the key or does not know the model.
        """
        return asyncio.run(self._run(asks, read))

    def body(self, ask: Ask) -> dict[str, Any]:
        """The body of a request as the server gets it."""
        body = {"model": self.options.model, "temperature": self.options.temperature, **ask.body}
        return {key: value for key, value in {**body, **self.options.extra_body}.items() if value is not None}

    def models(self, timeout_s: float = 10.0) -> list[str]:
        """Names of the server's models, by `GET /models`.

        Raises:
            ConfigError: it does not answer, refuses the key, or answers something else.
        """
        return asyncio.run(self._models(timeout_s))

    async def _run(self, asks: Iterator[Ask], read: Any) -> dict[int, Any]:
        results: dict[int, Any] = {}
        drawing = threading.Lock()

        def draw() -> Ask | None:
            with drawing:  # a generator runs in one thread at a time
                return next(asks, None)

        async def work(client: httpx.AsyncClient) -> None:
            while (ask := await asyncio.to_thread(draw)) is not None:
                try:
                    results[ask.index] = await self._one(client, ask, read)
                except BadRecord as bad:
                    results[ask.index] = bad

        async with self._open(self.options.timeout_s) as client:
            workers = [asyncio.create_task(work(client)) for _ in range(self.options.max_concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return results

    async def _one(self, client: httpx.AsyncClient, ask: Ask, read: Any) -> Any:
        body = self.body(ask)
        num_invalid = 0
        for attempt in itertools.count():
            request_id = f"paracaption-{uuid.uuid4().hex[:16]}"
            outcome = await self._post(client, body, request_id, ask.read or read)
            if not isinstance(outcome, _Failure):
                return outcome
            if outcome.final is not None:
                raise outcome.final
            log.warning(
                "%s: request %s, attempt %d of %d: %s",
                self.where,
                outcome.request_id,
                attempt + 1,
                self.options.max_retries + 1,
                outcome.detail,
            )
            if failed_by_answer := outcome.reason is not Reason.MODEL_ERROR:
                num_invalid += 1
                body |= {"temperature": max(RETRY_TEMPERATURE, self.options.temperature)}
            if attempt >= self.options.max_retries or num_invalid > INVALID_RETRIES:
                await self._give_up(client, outcome)
            self.num_retries += 1
            if failed_by_answer:
                continue
            grown = min(LONGEST_WAIT_S, self.options.backoff_s * 2**attempt)
            wait = grown * (0.5 + random.random() / 2) if outcome.wait_s is None else outcome.wait_s
            await asyncio.sleep(min(LONGEST_WAIT_S, wait))
        raise AssertionError("unreachable")

    async def _post(self, client: httpx.AsyncClient, body: dict, request_id: str, read: Any) -> Any:
        import httpx

        self.num_requests += 1
        url, headers = f"{self.url}/chat/completions", {"X-Request-Id": request_id}
        try:
            response = await _fetch(client, "POST", url, self.options.timeout_s, json=body, headers=headers)
        except (httpx.TimeoutException, TimeoutError):
            return _Failure(request_id, f"no answer within {self.options.timeout_s:g} s")
        except (httpx.HTTPError, httpx.StreamError) as error:
            return _Failure(request_id, self._words(error))
        request_id = self._clean(response.headers.get("x-request-id") or request_id)[:_MAX_TEXT]
        if response.status_code >= 300:
            return self._refused(response, request_id)
        log.debug("%s: request %s answered", self.where, request_id)
        try:
            choice = parse_json(self._without_secret(response.text))["choices"][0]
            assert isinstance(choice, dict) and isinstance(choice["message"], dict)
        except (ValueError, LookupError, TypeError, AssertionError):
            return _Failure(request_id, f"did not answer with a chat completion: {self._excerpt(response)}")
        try:
            return read(choice)
        except BadRecord as bad:
            return _Failure(request_id, self._clean(bad.detail), bad.reason)

    def _refused(self, response: httpx.Response, request_id: str) -> _Failure:
        status, message = response.status_code, self._excerpt(response)
        detail = f"HTTP {status}: {message}"
        if status in _SETUP or 300 <= status < 400:
            return _Failure(
                request_id, detail, final=StageFailed(f"{self.where}: {self._advice(status, message)}")
            )
        if status in _TRY_AGAIN or status >= 500:
            return _Failure(request_id, detail, wait_s=_retry_after(response), busy=status == 429)
        log.warning("%s: request %s refused: %s", self.where, request_id, detail)
        return _Failure(
            request_id, detail, final=BadRecord(Reason.MODEL_ERROR, f"the server refuses it: {detail}")
        )

    async def _give_up(self, client: httpx.AsyncClient, failure: _Failure) -> None:
        """Whose fault it was: the record's if the server is alive, else the server's."""
        import httpx

        if failure.reason is not Reason.MODEL_ERROR:
            raise BadRecord(failure.reason, failure.detail)
        alive = False
        if not failure.busy:
            seconds = min(10.0, self.options.timeout_s)
            try:
                alive = (await _fetch(client, "GET", f"{self.url}/models", seconds)).status_code < 500
            except (httpx.HTTPError, httpx.StreamError, TimeoutError):
                alive = False
        times = self.options.max_retries + 1
        if alive:
            raise BadRecord(Reason.MODEL_ERROR, f"failed {times} times: {failure.detail}")
        advice = (
            f"too many requests: lower {self.where}.max_concurrency, or check your quota"
            if failure.busy
            else f"start the server, or fix {self.where}.base_url, or raise {self.where}.timeout_s, "
            "then run the same command again"
        )
        raise StageFailed(f"{self.where}: {self.url} failed {times} times: {failure.detail}; {advice}")

    def _advice(self, status: int, message: str) -> str:
        if status in (401, 403):
            given, do = ("refuses", "correct") if self._key() else ("asks for", "set")
            return (
                f"{self.url} {given} a key (HTTP {status}: {message}); "
                f"{do} the key in {self.options.api_key_env} on every node"
            )
        return (
            f"{self.url} does not know this address or the model {self.options.model!r} (HTTP {status}: "
            f"{message}); "
            f"open {self.url}/models, then fix {self.where}.base_url or {self.where}.model"
        )

    async def _models(self, timeout_s: float) -> list[str]:
        import httpx

        timeout_s = min(timeout_s, self.options.timeout_s)
        try:
            async with self._open(timeout_s) as client:
                response = await _fetch(client, "GET", f"{self.url}/models", timeout_s)
        except (httpx.HTTPError, httpx.StreamError, TimeoutError) as error:
            raise ConfigError(
                f"{self.where}.base_url: {self.url}/models does not answer ({self._words(error)}); "
                "start the server or fix the URL"
            ) from None
        if response.status_code >= 300:
            raise ConfigError(f"{self.where}: {self._advice(response.status_code, self._excerpt(response))}")
        try:
            return [str(entry["id"])[:_MAX_TEXT] for entry in parse_json(response.text)["data"]]
        except (ValueError, LookupError, TypeError):
            raise ConfigError(
                f"{self.where}.base_url: {self.url}/models is not a list of models "
                f"({self._excerpt(response)}); fix "
                "the URL, which usually ends in /v1"
            ) from None

    def _open(self, timeout_s: float) -> httpx.AsyncClient:
        import httpx

        logging.getLogger("httpcore").setLevel(logging.INFO)  # at DEBUG it writes headers down
        key = self._key()
        try:
            headers = {"Accept-Encoding": "identity"}  # a packed answer may be of any size
            headers |= {"Authorization": f"Bearer {key}"} if key else {}
            key.encode("ascii")
        except UnicodeEncodeError:
            raise ConfigError(
                f"{self.options.api_key_env}: the key holds a character that is not ASCII; copy it again"
            ) from None
        limit = self.options.max_concurrency
        return httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            limits=httpx.Limits(max_connections=limit, max_keepalive_connections=limit),
        )

    def _excerpt(self, response: httpx.Response) -> str:
        """What a server says, shortly: the message of an error, or the start of the body."""
        text = response.content[:_MAX_BYTES].decode("utf-8", "replace")
        try:
            error = parse_json(text)
            error = error.get("error", error) if isinstance(error, dict) else error
            text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
        except ValueError:
            pass
        return self._clean(" ".join(text.split()))[:_MAX_TEXT]

    def _words(self, error: Exception) -> str:
        """The type of an error of the connection and its text, shortly."""
        return f"{type(error).__name__}: {self._clean(str(error))}"[:_MAX_TEXT]

    def _clean(self, text: str) -> str:
        """The text, for an error or a log, without the key."""
        key = self._key()
        return text.replace(key, "[key]") if key else text

    def _without_secret(self, text: str) -> str:
        """An answer without the key.

        Keys shorter than 8 characters (such as the placeholder "none") are not removed from answers, since
        they may be ordinary words.
        """
        return self._clean(text) if len(self._key()) >= _SECRET_LENGTH else text

    def _key(self) -> str:
        return os.environ.get(self.options.api_key_env, "").strip()


class _Failure(NamedTuple):
    """A try that failed; `final` if another one cannot help, `wait_s` if the server says how long to wait."""

    request_id: str
    detail: str
    reason: Reason = Reason.MODEL_ERROR
    final: Exception | None = None
    wait_s: float | None = None
    busy: bool = False


async def _fetch(
    client: httpx.AsyncClient, method: str, url: str, timeout_s: float, **given: Any
) -> httpx.Response:
    """A whole answer, with limits on its bytes and on the seconds to its end.

    Raises:
        TimeoutError: it does not end in time, as a stream that trickles does not.
        httpx.HTTPError: the connection fails, or the answer is no HTTP.
        httpx.StreamError: it is longer than 16 MiB, or packed although nobody asked for that.
    """
    import httpx

    data = bytearray()
    async with asyncio.timeout(timeout_s), client.stream(method, url, timeout=timeout_s, **given) as response:
        packed = response.headers.get("content-encoding", "").strip().lower()
        if packed not in ("", "identity"):
            raise httpx.StreamError(f"it packs its answers as {packed[:20]!a}, which was not asked for")
        async for part in response.aiter_raw():
            data += part
            if len(data) > _MAX_BYTES:
                raise httpx.StreamError(f"an answer of more than {_MAX_BYTES >> 20} MiB")
    headers = [pair for pair in response.headers.raw if pair[0].lower() in _HEADERS]
    return httpx.Response(response.status_code, headers=headers, content=bytes(data))


def parse_json(text: str) -> Any:
    """JSON from a server or a model.

    Raises:
        ValueError: it is not JSON, or is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait, from a number or a date."""
    value = response.headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
