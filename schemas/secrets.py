"""Secrets in a configuration or a text: passwords, tokens and signatures, which are published with a corpus.

A configuration that holds one is refused before anything is written. A text that may have one from elsewhere,
such as a server's error message, is shortened. The way to give a secret is an environment variable, on every
node.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

HIDDEN = "[secret]"
"""What stands for a secret in a text."""

FIX = (
    "it would be published with the corpus. Give it in the nodes' environment (FSSPEC_HTTP, FSSPEC_HTTPS, "
    "AWS_ACCESS_KEY_ID, a `..._env` option), or fetch the file and name the local copy"
)

_WORDS = frozenset(
    "apikey auth authorization bearer cookie credential credentials cred creds jwt passphrase passwd "
    "password pat pass pw pwd sas secret secrets sig signature token passcode webhook".split()
)
"""What a name has as a word if its value is a secret."""

_PAIRS = re.compile(
    r"(^|_)((access|account|api|auth|client|encryption|master|private|secret|session|shared|ssh|storage"
    r"|subscription)_?keys?(_id)?|connection_?string|conn_?str|dsn)$"
)
_VARIABLE_WORDS = _WORDS | {"key", "keys", "dsn"}
_PASSWORDS = frozenset({"password", "passwd", "passphrase", "passcode", "pwd", "pw", "secret"})
"""Of these also a number is a secret; other names may have counts of tokens."""

_GROUPS = frozenset({"auth", "cookies", "cred", "credential", "credentials", "creds", "secrets"})
"""Of these also what is no text is a secret; what stands in others is looked at by its own names."""

_HARMLESS = re.compile(
    r".*_(env|file|path|variable|name|url|uri|endpoint|type|count|limit)s?"
    r"|(bos|cls|eos|image|mask|pad|prompt|sep|stop|unk|video)_token"
)
"""Names of where a secret is, or of a tokenizer's words."""

_QUERY = re.compile(
    r"(x_(amz|goog|oss|cos|obs|ms)_.*|aws_?access_?key_?id|ossaccesskeyid|googleaccessid|key_pair_id|policy"
    r"|key|code|auth\w*|s[eigprv]|skt?|sk[a-z]|expires?|hdnea?|hmac|h_?mac|se?ss?ion(_?id)?|sid|ticket|q_sign.*)"
)
"""Names in a query whose values, in signed URLs and elsewhere, let in whoever has them."""

_OPEN_QUERY = re.compile(r"(version_?id|generation|rev(ision)?|commit|sha\w*|md5|etag|v|version|id|file_?id)")

_TOKENS = re.compile(
    r"""(?<![A-Za-z0-9])(?:
      gh[pousr]_[A-Za-z0-9]{16,} | github_pat_\w{16,} | glpat-[\w-]{16,} | hf_[A-Za-z0-9]{16,}
    | sk-[\w-]{16,} | xox[abeoprs]-[\w-]{10,} | (?:AKIA|ASIA)[A-Z0-9]{12,} | AIza[\w-]{30,} | ya29\.[\w-]{16,}
    | pypi-[\w-]{16,} | npm_[A-Za-z0-9]{20,} | dckr_pat_[\w-]{16,} | pnu_[A-Za-z0-9]{16,}
    | eyJ[\w-]{8,400}\.[\w-]{8,}(?:\.[\w-]*)?
    )""",
    re.VERBOSE,
)
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_URL = re.compile(r"[a-z][a-z0-9+.-]{0,20}://[^\s'\"<>\\^`{|}]+", re.IGNORECASE)
_IN_BRACES = re.compile(r"\$\{(\w+)\}")
_LOGIN = re.compile(r"(?<=://)[^/?#\s'\"<>]*@")
_NAMES = (
    r"[\w-]{0,40}(?:password|passwd|secret|token|api[_-]?key|access[_-]?key|account[_-]?key|sharedaccesskey"
    r"|signature|pwd)"
)
_VALUE = r"(?P<value>\"[^\"]+\"|'[^']+'|[^\s,;&'\"\[\]{}()<>]+)"
_BEARER = r"(?P<kind>\b(?:bearer|basic)\s+)(?P<bearer>(?=\S*[0-9=])[A-Za-z0-9+/=._~-]{12,})"
_TOLD = re.compile(rf"(?i)(?<![A-Za-z0-9])(?P<name>{_NAMES}[\"']?\s*[:=]\s*){_VALUE}|{_BEARER}")
"""A secret with its name, as errors and headers have it."""
_GIVEN = re.compile(rf"(?i)(?<![A-Za-z0-9])(?P<name>{_NAMES}=|--{_NAMES}[ =]){_VALUE}|{_BEARER}")
"""The same as options and connection strings have it: prose with a colon is no secret."""

_LEAST = 8
"""Shorter values of environment variables are ordinary words."""


class Found(NamedTuple):
    """A secret of a configuration: where it is, and what it is, without its value."""

    place: tuple[int | str, ...]
    what: str


def find(values: Any, place: tuple[int | str, ...] = ()) -> Iterator[Found]:
    """Every secret in a configuration's values.

    Args:
        values: as YAML gives them.
        place: of the values.
    """
    if hasattr(values, "model_dump"):
        values = values.model_dump()
    if isinstance(values, Mapping):
        for name, value in values.items():
            at = (*place, name if isinstance(name, int | str) else str(name))
            if isinstance(name, str) and (what := find_in_text(name)):
                yield Found((*place, "key"), what)
            elif is_secret_name(name, variable="env_vars" in place) and _is_given(value, name):
                yield Found(at, f"{name} looks like a secret")
            else:
                yield from find(value, at)
    elif isinstance(values, list | tuple | set | frozenset):
        before = ""
        for number, value in enumerate(values):
            is_option = isinstance(before, str) and before.startswith("-") and is_secret_name(before)
            if is_option and _is_given(value):
                yield Found((*place, number), f"is the value of {before}, which looks like a secret")
            yield from find(value, (*place, number))
            before = value
    elif isinstance(values, str | bytes):
        text = values.decode("utf-8", "replace") if isinstance(values, bytes) else values
        if what := find_in_text(text):
            yield Found(place, what)
        elif text.lstrip()[:1] == "{":  # options of a file system in a variable
            with suppress(ValueError, RecursionError):
                inner = next(find(json.loads(text)), None)
                if inner is not None:
                    yield Found(place, "holds a secret")


def find_in_text(text: str) -> str:
    """What secret a value of a configuration holds, in words; "" if it holds none."""
    text = _IN_BRACES.sub(r"$\1", text)
    for url in _URL.findall(text):
        if what := _find_in_url(url):
            return what
    if _PEM.search(text):
        return "holds a private key"
    if _TOKENS.search(text):
        return "holds a token"
    given = _GIVEN.search(text)
    return "holds a password or a token" if given and not _is_reference(given["value"] or "") else ""


def is_secret_name(name: Any, variable: bool = False) -> bool:
    """Whether a name, such as `api_key`, is that of a secret; of an environment variable more names are."""
    return isinstance(name, str) and _is_secret_name(name, variable)


@lru_cache(4096)
def _is_secret_name(name: str, variable: bool) -> bool:
    """The environment's names are asked for with each text that is shortened."""
    snake = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()).strip("_")
    if variable:
        return bool(set(snake.split("_")) & _VARIABLE_WORDS or _PAIRS.search(snake))
    if _HARMLESS.fullmatch(snake):
        return False
    return bool(snake.rpartition("_")[2] in _WORDS or _PAIRS.search(snake))


def shorten(text: str, environment: bool = True) -> str:
    """A text without the secrets that it may hold; one without any is returned as it is.

    Args:
        text: of a log, an event, an error.
        environment: also hide what follows a name such as `password`, and the values of environment
            variables whose names are a secret's. False for what has to be the same on every machine.
    """
    if "://" in text:
        text = _URL.sub(lambda found: _shorten_url(found[0]), text)
    if "PRIVATE KEY" in text:
        text = _PEM.sub(HIDDEN, text)
    text = _TOKENS.sub(HIDDEN, text)
    if environment:
        text = _TOLD.sub(_shorten_assigned, text)
        for value in _environment():
            text = text.replace(value, HIDDEN)
    return text


def open_name(name: str) -> str:
    """What a record calls a file, without a login and without a query that lets in whoever has it.

    A name without these is returned as it is, also one with another query.
    """
    if "?" not in name and "@" not in name:
        return name
    head, mark, query = name.partition("?")
    is_signed = mark and query and any(_secret_queries(name if "://" in name else f"https://host/{name}"))
    return _LOGIN.sub("", head if is_signed else name)


def open_json(raw: bytes) -> bytes:
    """JSON of a record without the secrets of its addresses; one without any is returned to the byte."""
    if b"://" not in raw and b":\\/\\/" not in raw:
        return raw
    try:
        text = json.dumps(json.loads(raw), ensure_ascii=False)  # a URL may be escaped as it was written
        opened = shorten(text, environment=False)
        return raw if opened == text else opened.encode()
    except (ValueError, RecursionError):
        text = raw.decode("utf-8", "surrogateescape")
        return shorten(text, environment=False).encode("utf-8", "surrogateescape")


def _environment() -> Iterator[str]:
    """Values of environment variables that are secrets, and the logins of URLs in others."""
    for name, value in os.environ.items():
        if is_secret_name(name, variable=True) and len(value) >= _LEAST and not value.startswith("/"):
            yield value
        elif "@" in value and (login := _LOGIN.search(value)) and ":" in login[0]:
            yield login[0][:-1]


def _is_given(value: Any, name: Any = "") -> bool:
    if isinstance(value, str | bytes):
        return bool(value) and not _is_reference(str(value))
    last = str(name).lower().replace("-", "_").rpartition("_")[2]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return last in _PASSWORDS
    return isinstance(value, Mapping | list | tuple) and bool(value) and last in _GROUPS


def _is_reference(value: str) -> bool:
    """Whether a value names an environment variable, whose value nobody writes down."""
    return bool(re.fullmatch(r"[\"']?(\$\{?\w+\}?|null|none|true|false)[\"']?", value, re.IGNORECASE))


def _find_in_url(url: str) -> str:
    login = _LOGIN.search(url)
    if login and not _is_reference(login[0][:-1].partition(":")[2]):
        is_name_alone = ":" not in login[0] and not url.lower().startswith(("http", "ftp"))
        if not is_name_alone:
            return "holds a name or a password"
    return "holds a signature or a token" if any(_secret_queries(url)) else ""


def _secret_queries(url: str) -> Iterator[str]:
    """Values in a URL's query that let in whoever has them."""
    try:
        address = urlsplit(url)
        pairs = parse_qsl(address.query.replace(";", "&"), keep_blank_values=True)
        pairs += parse_qsl(address.fragment) if "=" in address.fragment else []
    except ValueError:
        pairs = []
    for name, value in pairs:
        snake = re.sub(r"[^a-z0-9]+", "_", name.lower())
        if not value or _is_reference(value):
            continue
        if is_secret_name(name) or _QUERY.fullmatch(snake) or _TOKENS.search(value):
            yield value
        elif not _OPEN_QUERY.fullmatch(snake) and re.fullmatch(
            r"(?=.*\d)(?=.*[A-Za-z])[A-Za-z0-9+/=]{24,}", value
        ):
            yield value


def _shorten_url(url: str) -> str:
    url = _LOGIN.sub("", url)
    head, mark, query = url.partition("?")
    return f"{head}?..." if mark and query and any(_secret_queries(url)) else url


def _shorten_assigned(found: re.Match[str]) -> str:
    value = found["value"] or found["bearer"]
    if _is_reference(value) or HIDDEN in value:
        return found[0]
    return f"{found['name'] or found['kind']}{HIDDEN}"
