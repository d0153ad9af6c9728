"""A corpus in a bucket, over obstore: nothing is moved there, and of all who create a name one wins.

The commit log needs put-if-absent alone. A file that a record is to name gets a name that nobody else has
(`new_name`), and keeps it. obstore asks again by itself, so an answer may be lost and the second request meet
what the first one wrote: what is there is compared with what was to be written.
"""

from __future__ import annotations

import io
import time
import uuid
from contextlib import suppress
from typing import IO, Any, NoReturn, cast

from ...schemas.errors import ConfigError
from ...schemas.secrets import shorten
from .activity import NOW, touching
from .bucket_clients import BucketError, add_corpus, insist, key_of, names_in, place_of
from .scratch import Staged
from .store_kind import Store

_CONFLICTS = 5
"""How often a name is created again that is said to be taken while nothing is there."""

_CONFLICT_S = 0.05

_DELETED_AT_ONCE = 1000


class BucketStore(Store):
    """S3, Azure's blobs, Google's storage, or the memory of this process. It holds no secret."""

    moves = False

    def new_name(self, path: str) -> str:
        """Of "shards/coconut-000000.tar", for one: "shards/coconut-000000-1f0c66ab52d3.tar"."""
        folder, slash, name = path.rpartition("/")
        stem, dot, suffix = name.rpartition(".")
        nonce = uuid.uuid4().hex[:12]
        return f"{folder}{slash}{stem}-{nonce}{dot}{suffix}" if stem else f"{folder}{slash}{name}-{nonce}"

    @touching
    def create(self, path: str, data: bytes) -> bool:
        _let_in(path)
        return insist(lambda calls, client: _create(calls, client, key_of(path), data), path)

    @touching
    def put(self, path: str, data: bytes) -> None:
        _let_in(path)
        insist(lambda calls, client: calls.put(client, key_of(path), data), path)

    def write(self, path: str) -> IO[bytes]:
        return cast(IO[bytes], Upload(path))

    def move(self, path: str, target: str) -> NoReturn:
        raise _never_moves(path, target)

    def keep(self, path: str, target: str) -> NoReturn:
        raise _never_moves(path, target)

    def flush(self, folder: str) -> None:
        """Nothing: an object is durable when it is written."""

    def make_folder(self, path: str) -> None:
        """Nothing: a folder is what the names of objects have in common."""

    @touching
    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            insist(lambda calls, client: calls.delete(client, key_of(path)), path)

    @touching
    def delete_folder(self, path: str) -> None:
        key = place_of(path).key or None
        with suppress(OSError, ConfigError):
            found = insist(lambda calls, client: calls.list(client, key).collect(), path)
            keys = [each["path"] for each in found]
            for start in range(0, len(keys), _DELETED_AT_ONCE):
                some = keys[start : start + _DELETED_AT_ONCE]
                with suppress(FileNotFoundError):  # another one deletes them too
                    insist(lambda calls, client, some=some: calls.delete(client, some), path)

    @touching
    def size(self, path: str) -> int | None:
        try:
            return _head(path)["size"]
        except (FileNotFoundError, IsADirectoryError):
            return None

    @touching
    def read(self, path: str) -> bytes:
        return insist(lambda calls, client: calls.get(client, key_of(path)).bytes().to_bytes(), path)

    @touching
    def list(self, folder: str) -> list[str]:
        try:
            return insist(lambda calls, client: names_in(calls, client, place_of(folder).key), folder)
        except FileNotFoundError:
            return []

    @touching
    def modified_s(self, path: str) -> float:
        return _head(path)["last_modified"].timestamp()


class Upload(io.BufferedIOBase):
    """A new object, staged on this machine until `close` uploads it; one that is given up leaves nothing.

    It is given up by `discard`, by an error in a `with` block, and by being forgotten.
    """

    def __init__(self, path: str):
        self._path = path
        scheme, bucket, key = place_of(path)
        self._staged = Staged(f"{scheme}://{bucket}", key.rpartition("/")[2])

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.closed:
            raise ValueError("write to closed file")
        return self._staged.write(data)

    def tell(self) -> int:
        return self._staged.size

    def close(self) -> None:
        """Upload what was written, and see that it has arrived.

        Raises:
            OSError: it has not.
        """
        if self.closed:
            return
        try:
            self._upload()
        finally:
            self.discard()

    def discard(self) -> None:
        """Give the object up."""
        self._staged.discard()
        super().close()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def __del__(self) -> None:
        with suppress(AttributeError):  # of one whose making failed
            self.discard()

    def _upload(self) -> None:
        key, content, size = key_of(self._path), self._staged.content(), self._staged.size

        def upload(calls: Any, client: Any) -> None:
            calls.put(client, key, content)
            if (arrived := calls.head(client, key)["size"]) != size:
                raise BucketError(f"{arrived} of {size} bytes have arrived")

        _let_in(self._path)
        with NOW.touching(self._path):
            insist(upload, self._path)


def _head(path: str) -> Any:
    return insist(lambda calls, client: calls.head(client, key_of(path)), path)


def _create(calls: Any, client: Any, key: str, data: bytes) -> bool:
    """Whether this call, or an earlier one whose answer was lost, has written it."""
    for turn in range(_CONFLICTS):
        try:
            calls.put(client, key, data, mode="create")
            return True
        except calls.exceptions.AlreadyExistsError:
            with suppress(FileNotFoundError):
                return calls.get(client, key).bytes().to_bytes() == data
        time.sleep(_CONFLICT_S * 2**turn)
    raise BucketError("said to be there, and is not", 409)


def _let_in(path: str) -> None:
    """Read over obstore what this process writes, also in `memory://`, which fsspec has, too."""
    scheme, bucket, _ = place_of(path)
    add_corpus(scheme, bucket)


def _never_moves(path: str, target: str) -> AssertionError:
    return AssertionError(
        f"{shorten(path)} -> {shorten(target)}: nothing is moved in a bucket (`Store.moves`)"
    )
