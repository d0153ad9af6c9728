"""What a bucket of S3 answers to each request; `tests/object_server.py` is the server around it."""

from __future__ import annotations

import base64
import hashlib
import re
import threading
import time
import uuid
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from io import BufferedIOBase
from urllib.parse import quote, unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from tests.object_faults import Faults

_CONDITIONS = ("if-none-match", "if-match")
_KEPT_HEADERS = (
    "content-type",
    "content-encoding",
    "content-disposition",
    "content-language",
    "cache-control",
)
_SMALLEST_PART = 5 << 20
"""Bytes of each part of an upload but the last."""
_CODES = {403: "AccessDenied", 409: "ConditionalRequestConflict", 429: "SlowDown", 500: "InternalError"}
_CODES |= {503: "SlowDown"}
Xml = Mapping[str, "Xml"] | Sequence[tuple[str, "Xml"]] | str | int
"""Elements by name in order; pairs may hold a name several times."""


@dataclass
class Answer:
    """A response; an empty one says that all is well."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def xml(cls, root: str, content: Xml = "", status: int = 200) -> Answer:
        text = f'<?xml version="1.0" encoding="UTF-8"?>{_xml({root: content})}'
        return cls(status, text.encode(), {"Content-Type": "application/xml"})


class Refused(Exception):
    """An error of S3: its status, its code, and what it is about."""

    def __init__(self, status: int, code: str, about: str = "") -> None:
        super().__init__(code)
        self.status, self.code, self.about = status, code, about

    def answer(self) -> Answer:
        content = {"Code": self.code, "Message": self.code, "Resource": self.about}
        return Answer.xml("Error", content, self.status)


def failure(status: int) -> Answer:
    """What S3 sends with a status of an error."""
    return Refused(status, _CODES.get(status, "Error")).answer()


@dataclass
class Call:
    """One request to a bucket."""

    method: str
    bucket: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    def __post_init__(self) -> None:
        self.operation = _operation(self)
        self.conditions = {name: self.headers[name] for name in _CONDITIONS if name in self.headers}
        self.keys = self._keys()

    def _keys(self) -> list[str]:
        """The object's key, those of a bulk delete, or the prefix of a listing."""
        if self.operation == "DeleteObjects":
            return _texts(self.body, "Key") or [""]
        return [self.key or self.query.get("prefix", "")]


@dataclass
class Stored:
    """An object. `number` and `made` (monotonic, seconds) are of the put that made the key."""

    content: bytes
    etag: str
    headers: dict[str, str]
    number: int = 0
    made: float = 0.0
    modified: float = 0.0


@dataclass
class Upload:
    """A multipart upload; `etag` as soon as it is complete."""

    key: str
    headers: dict[str, str]
    parts: dict[int, tuple[bytes, str]] = field(default_factory=dict)
    etag: str = ""


class Bucket:
    """Objects and uploads; each request is carried out as a whole or not at all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._objects: dict[str, Stored] = {}
        self._keys: list[str] = []
        self._uploads: dict[str, Upload] = {}
        self._puts = 0

    def sizes(self, prefix: str) -> dict[str, int]:
        with self._lock:
            return {key: len(self._objects[key].content) for key in self._keys if key.startswith(prefix)}

    def content(self, key: str) -> bytes:
        return self._objects[key].content

    def unfinished(self) -> dict[str, str]:
        with self._lock:
            return {number: upload.key for number, upload in self._uploads.items() if not upload.etag}

    def answer(self, call: Call, faults: Faults) -> Answer:
        """Carry out one request. Raises `Refused`."""
        match call.operation:
            case "PutObject":
                return self._put(call, faults)
            case "CopyObject":
                return self._copy(call, faults)
            case "GetObject" | "HeadObject":
                return self._get(call)
            case "DeleteObject":
                self._delete([call.key])
                return Answer(204)
            case "DeleteObjects":
                self._delete(call.keys)
                return Answer.xml("DeleteResult", [("Deleted", {"Key": key}) for key in call.keys])
            case "ListObjectsV2":
                return self._list(call, faults)
            case "CreateMultipartUpload":
                return self._create_upload(call)
            case "UploadPart":
                return self._upload_part(call)
            case "CompleteMultipartUpload":
                return self._complete(call, faults)
            case "AbortMultipartUpload":
                with self._lock:
                    self._upload(call)
                    del self._uploads[call.query["uploadId"]]
                return Answer(204)
            case "ListMultipartUploads":
                uploads = [("Upload", {"Key": k, "UploadId": n}) for n, k in self.unfinished().items()]
                return Answer.xml("ListMultipartUploadsResult", uploads)
            case "ListParts":
                with self._lock:
                    parts = sorted(self._upload(call).parts.items())
                listed = [("Part", {"PartNumber": n, "ETag": e, "Size": len(b)}) for n, (b, e) in parts]
                return Answer.xml("ListPartsResult", listed)
            case "HeadBucket":
                return Answer()
            case "GetBucketLocation":
                return Answer.xml("LocationConstraint")
        raise Refused(501, "NotImplemented", f"{call.method} {call.key}?{'&'.join(call.query)}")

    def _put(self, call: Call, faults: Faults) -> Answer:
        stored = Stored(call.body, _etag(call.body), _kept(call.headers))
        with self._lock:
            self._check(call, faults)
            self._store(call.key, stored)
        return Answer(headers={"ETag": stored.etag})

    def _copy(self, call: Call, faults: Faults) -> Answer:
        bucket, _, source = unquote(call.headers["x-amz-copy-source"]).removeprefix("/").partition("/")
        if bucket != call.bucket:
            raise Refused(501, "NotImplemented", "a copy from another bucket")
        with self._lock:
            self._check(call, faults)
            old = self._found(source)
            new = Stored(old.content, old.etag, old.headers)
            self._store(call.key, new)
        return Answer.xml("CopyObjectResult", {"ETag": new.etag, "LastModified": _iso(new.modified)})

    def _check(self, call: Call, faults: Faults) -> None:
        """Refuse a write whose conditions do not hold."""
        if faults.ignores_conditions:
            return
        there = self._objects.get(call.key)
        if "if-none-match" in call.conditions and there:
            raise Refused(412, "PreconditionFailed", call.key)
        if wanted := call.conditions.get("if-match"):
            if not there:
                raise Refused(404, "NoSuchKey", call.key)
            if wanted.strip('"') != there.etag.strip('"'):
                raise Refused(412, "PreconditionFailed", call.key)

    def _store(self, key: str, stored: Stored) -> None:
        self._puts += 1
        stored.number, stored.made, stored.modified = self._puts, time.monotonic(), time.time()
        if old := self._objects.get(key):
            stored.number, stored.made = old.number, old.made
        else:
            insort(self._keys, key)
        self._objects[key] = stored

    def _found(self, key: str) -> Stored:
        if stored := self._objects.get(key):
            return stored
        raise Refused(404, "NoSuchKey", key)

    def _get(self, call: Call) -> Answer:
        with self._lock:
            stored = self._found(call.key)
        headers = {"Content-Type": "application/octet-stream", **stored.headers}
        headers |= {"ETag": stored.etag, "Last-Modified": formatdate(stored.modified, usegmt=True)}
        headers["Accept-Ranges"] = "bytes"
        if call.conditions.get("if-match", "*").strip('"') not in ("*", stored.etag.strip('"')):
            raise Refused(412, "PreconditionFailed", call.key)
        if call.conditions.get("if-none-match", "").strip('"') in ("*", stored.etag.strip('"')):
            return Answer(304, headers=headers)
        size = len(stored.content)
        span = _span(call.headers.get("range", ""), size)
        if span is None:
            return Answer(200, stored.content, headers)
        headers["Content-Range"] = f"bytes {span[0]}-{span[1] - 1}/{size}"
        return Answer(206, stored.content[slice(*span)], headers)

    def _delete(self, keys: list[str]) -> None:
        with self._lock:
            for key in keys:
                if self._objects.pop(key, None):
                    del self._keys[bisect_left(self._keys, key)]

    def _list(self, call: Call, faults: Faults) -> Answer:
        prefix, delimiter = call.query.get("prefix", ""), call.query.get("delimiter", "")
        after = call.query.get("start-after", "")
        if token := call.query.get("continuation-token"):
            after = base64.urlsafe_b64decode(token).decode()
        most = min(int(call.query.get("max-keys") or 1000), faults.page_size)
        with self._lock:
            page, last = self._page(prefix, delimiter, after, most + 1, faults)
            listed = [(key, self._objects.get(key)) for key in page[:most]]
        written = quote if call.query.get("encoding-type") == "url" else str
        content: list[tuple[str, Xml]] = [("Name", call.bucket), ("Prefix", written(prefix))]
        content += [("KeyCount", len(listed)), ("MaxKeys", most)]
        content.append(("IsTruncated", "true" if len(page) > most else "false"))
        if "encoding-type" in call.query:
            content.append(("EncodingType", "url"))
        if len(page) > most:
            token = base64.urlsafe_b64encode(last[most - 1].encode()).decode() if most else ""
            content.append(("NextContinuationToken", token))
        content += [_listed(written(key), stored) for key, stored in listed]
        return Answer.xml("ListBucketResult", content)

    def _page(
        self, prefix: str, delimiter: str, after: str, most: int, faults: Faults
    ) -> tuple[list[str], list[str]]:
        """Keys and common prefixes behind `after`, and with each the last key that it stands for."""
        oldest, newest = time.monotonic() - faults.late_listing_s, self._puts - faults.late_listing_puts
        page: list[str] = []
        last: list[str] = []
        at = max(bisect_left(self._keys, prefix), bisect_right(self._keys, after))
        while at < len(self._keys) and self._keys[at].startswith(prefix):
            key = self._keys[at]
            stored = self._objects[key]
            at += 1
            if (faults.late_listing_s and stored.made > oldest) or stored.number > newest:
                continue
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            entry = key if cut < 0 else key[: cut + len(delimiter)]
            if len(page) == most:
                break
            if entry != key:  # all that it stands for is passed over
                at = bisect_left(self._keys, entry + "\U0010ffff", at)
            page.append(entry)
            last.append(self._keys[at - 1])
        return page, last

    def _create_upload(self, call: Call) -> Answer:
        number = uuid.uuid4().hex
        with self._lock:
            self._uploads[number] = Upload(call.key, _kept(call.headers))
        told = {"Bucket": call.bucket, "Key": call.key, "UploadId": number}
        return Answer.xml("InitiateMultipartUploadResult", told)

    def _upload(self, call: Call) -> Upload:
        upload = self._uploads.get(call.query["uploadId"])
        if upload is None or upload.key != call.key or upload.etag:
            raise Refused(404, "NoSuchUpload", call.query["uploadId"])
        return upload

    def _upload_part(self, call: Call) -> Answer:
        etag = _etag(call.body)
        with self._lock:
            self._upload(call).parts[int(call.query["partNumber"])] = (call.body, etag)
        return Answer(headers={"ETag": etag})

    def _complete(self, call: Call, faults: Faults) -> Answer:
        numbers = [int(number) for number in _texts(call.body, "PartNumber")]
        etags = [etag.strip('"') for etag in _texts(call.body, "ETag")]
        with self._lock:
            upload = self._uploads.get(call.query["uploadId"])
            if upload is None or upload.key != call.key or (upload.etag and faults.forgets_uploads):
                raise Refused(404, "NoSuchUpload", call.query["uploadId"])
            if not upload.etag:
                if not numbers or numbers != sorted(set(numbers)):
                    raise Refused(400, "InvalidPartOrder", call.key)
                if etags != [upload.parts.get(n, (b"", ""))[1].strip('"') for n in numbers]:
                    raise Refused(400, "InvalidPart", call.key)
                if any(len(upload.parts[n][0]) < _SMALLEST_PART for n in numbers[:-1]):
                    raise Refused(400, "EntityTooSmall", call.key)
                self._check(call, faults)
                digests = b"".join(bytes.fromhex(etag) for etag in etags)
                content = b"".join(upload.parts[n][0] for n in numbers)
                upload.etag = f'"{hashlib.md5(digests).hexdigest()}-{len(numbers)}"'
                upload.parts = {}
                self._store(call.key, Stored(content, upload.etag, upload.headers))
        told = {"Bucket": call.bucket, "Key": call.key, "ETag": upload.etag}
        return Answer.xml("CompleteMultipartUploadResult", told)


def read_headers(stream: BufferedIOBase) -> Iterator[tuple[str, str]]:
    """Names in lower case, and values."""
    while line := stream.readline(1 << 16).strip():
        name, _, value = line.decode("latin-1").partition(":")
        yield name.lower(), value.strip()


def read_body(stream: BufferedIOBase, headers: dict[str, str]) -> bytes | None:
    """A request's body, whole; None if the connection ended in the middle of it."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = _chunks(stream)
    else:
        size = int(headers.get("content-length") or 0)
        body = stream.read(size) if size else b""
        body = body if len(body) == size else None
    if body and "aws-chunked" in headers.get("content-encoding", ""):
        return _signed_chunks(body)
    return body


def _chunks(stream: BufferedIOBase) -> bytes | None:
    """The chunks of HTTP."""
    parts = []
    while line := stream.readline(1 << 16):
        size = int(line.split(b";")[0], 16)
        if not size:
            while stream.readline(1 << 16).strip():
                pass
            return b"".join(parts)
        parts.append(stream.read(size))
        stream.readline(1 << 16)
    return None


def _signed_chunks(body: bytes) -> bytes:
    """The chunks of Amazon's signature: `size;chunk-signature=...`, then the bytes; checksums may follow."""
    parts, at = [], 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end].split(b";")[0], 16)
        if not size:
            return b"".join(parts)
        parts.append(body[end + 2 : end + 2 + size])
        at = end + 2 + size + 2


def _operation(call: Call) -> str:
    """The name that S3 gives to a request, or "Unknown"."""
    query, method = call.query, call.method
    if not call.bucket:
        return "ListBuckets" if method == "GET" else "Unknown"
    if not call.key:
        if method == "GET":
            special = {"location": "GetBucketLocation", "uploads": "ListMultipartUploads"}
            named = next((name for key, name in special.items() if key in query), "")
            return named or ("ListObjectsV2" if query.get("list-type") == "2" else "Unknown")
        if method == "POST":
            return "DeleteObjects" if "delete" in query else "Unknown"
        return {"PUT": "CreateBucket", "HEAD": "HeadBucket"}.get(method, "Unknown")
    if "uploadId" in query:
        upload = {"PUT": "UploadPart", "POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"}
        return {**upload, "GET": "ListParts"}.get(method, "Unknown")
    if method == "POST":
        return "CreateMultipartUpload" if "uploads" in query else "Unknown"
    if method == "PUT" and "x-amz-copy-source" in call.headers:
        return "CopyObject"
    whole = {"PUT": "PutObject", "GET": "GetObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"}
    return whole.get(method, "Unknown")


def _span(asked: str, size: int) -> tuple[int, int] | None:
    """First byte and the one behind the last; None is all of it. What is no range of bytes is passed over."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
    if not match or asked == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last or size) + 1)
    if start >= size or start >= stop:
        raise Refused(416, "InvalidRange", asked)
    return start, stop


def _listed(written: str, stored: Stored | None) -> tuple[str, Xml]:
    if stored is None:
        return "CommonPrefixes", {"Prefix": written}
    return "Contents", {
        "Key": written,
        "LastModified": _iso(stored.modified),
        "ETag": stored.etag,
        "Size": len(stored.content),
        "StorageClass": "STANDARD",
    }


def _kept(headers: dict[str, str]) -> dict[str, str]:
    """What comes back with the object, without the encoding of the upload itself."""
    kept = {n: v for n, v in headers.items() if n in _KEPT_HEADERS or n.startswith("x-amz-meta-")}
    encoding = kept.pop("content-encoding", "").replace("aws-chunked", "").strip(", ")
    return {**kept, **({"content-encoding": encoding} if encoding else {})}


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))


def _texts(body: bytes, name: str) -> list[str]:
    """The texts of all elements of that name, whatever their namespace."""
    found = ElementTree.fromstring(body).iter()
    return [each.text or "" for each in found if each.tag.rpartition("}")[2] == name]


def _xml(content: Xml) -> str:
    if isinstance(content, (str, int)):
        return escape(str(content))
    pairs = content.items() if isinstance(content, Mapping) else content
    return "".join(f"<{name}>{_xml(each)}</{name}>" for name, each in pairs)
