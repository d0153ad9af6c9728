"""A corpus in a bucket, over obstore: nothing is moved there, and of all who create a name one wins.

The commit log needs put-if-absent alone. A file that a record is to name gets a name that nobody else has
(`new_name`), and keeps it. obstore asks again by itself, so an answer may be lost and the second request meet
what the first one wrote: what is there is compared with what was to be written.
"""

from __future__ import annotations

import io
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, NoReturn, TypeVar, cast

from ...schemas.secrets import shorten
from .activity import NOW, touching
from .bucket_clients import BucketError, Place, client_of, insist, open_memory, place_of
from .scratch import Staged
from .store_kind import Store

Result = TypeVar("Result")

_CONFLICTS = 5
"""How often a name is created again that is said to be taken while nothing is there."""

_CONFLICT_S = 0.05

_DELETED_AT_ONCE = 1000


class BucketStore(Store):
    """S3, Azure's blobs, Google's storage, or the memory of this process. It holds no client and no secret."""

    moves = False

    def new_name(self, path: str) -> str:
        """Of "shards/coconut-000000.tar", for one: "shards/coconut-000000-1f0c66ab52d3.tar"."""
        folder, slash, name = path.rpartition("/")
        stem, dot, suffix = name.rpartition(".")
        nonce = uuid.uuid4().hex[:12]
        return f"{folder}{slash}{stem}-{nonce}{dot}{suffix}" if stem else f"{folder}{slash}{name}-{nonce}"

    @touching
    def create(self, path: str, data: bytes) -> bool:
        place, bucket = _open_to_write(path)
        return insist(lambda: _create(bucket, place.key, data), path)

    @touching
    def put(self, path: str, data: bytes) -> None:
        import obstore

        place, bucket = _open_to_write(path)
        insist(lambda: obstore.put(bucket, place.key, data), path)

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
        import obstore

        place = place_of(path)
        with suppress(FileNotFoundError):
            _call(lambda bucket: obstore.delete(bucket, place.key), path)

    @touching
    def delete_folder(self, path: str) -> None:
        import obstore

        def delete(bucket: Any) -> None:
            for found in obstore.list(bucket, place_of(path).key or None, chunk_size=_DELETED_AT_ONCE):
                obstore.delete(bucket, [each["path"] for each in found])

        with suppress(OSError):
            _call(delete, path)

    @touching
    def size(self, path: str) -> int | None:
        import obstore

        try:
            return _call(lambda bucket: obstore.head(bucket, place_of(path).key), path)["size"]
        except FileNotFoundError:
            return None

    @touching
    def read(self, path: str) -> bytes:
        import obstore

        return _call(lambda bucket: obstore.get(bucket, place_of(path).key).bytes().to_bytes(), path)

    @touching
    def list(self, folder: str) -> list[str]:
        import obstore

        key = place_of(folder).key
        try:
            found = _call(lambda bucket: obstore.list_with_delimiter(bucket, key or None), folder)
        except FileNotFoundError:
            return []
        keys = [*found["common_prefixes"], *(each["path"] for each in found["objects"])]
        return sorted({name for each in keys if (name := each[len(key) :].strip("/"))})

    @touching
    def modified_s(self, path: str) -> float:
        import obstore

        found = _call(lambda bucket: obstore.head(bucket, place_of(path).key), path)
        return found["last_modified"].timestamp()


class Upload(io.BufferedIOBase):
    """A new object, staged on this machine until `close` uploads it; one that is given up leaves nothing.

    It is given up by `discard`, by an error in a `with` block, and by being forgotten.
    """

    def __init__(self, path: str):
        self._path, self._place = path, place_of(path)
        home = f"{self._place.scheme}://{self._place.bucket}"
        self._staged = Staged(home, self._place.key.rpartition("/")[2])

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
        import obstore

        _, bucket = _open_to_write(self._path)
        key, content, size = self._place.key, self._staged.content(), self._staged.size

        def upload() -> None:
            obstore.put(bucket, key, content)
            if (arrived := obstore.head(bucket, key)["size"]) != size:
                raise BucketError(f"{arrived} of {size} bytes have arrived")

        with NOW.touching(self._path):
            insist(upload, self._path)


def _create(bucket: Any, key: str, data: bytes) -> bool:
    """Whether this call, or an earlier one whose answer was lost, has written it."""
    import obstore
    from obstore.exceptions import AlreadyExistsError

    for turn in range(_CONFLICTS):
        try:
            obstore.put(bucket, key, data, mode="create")
            return True
        except AlreadyExistsError:
            with suppress(FileNotFoundError):
                return obstore.get(bucket, key).bytes().to_bytes() == data
        time.sleep(_CONFLICT_S * 2**turn)
    raise BucketError("said to be there, and is not", 409)


def _call(question: Callable[[Any], Result], path: str) -> Result:
    bucket = client_of(place_of(path))
    return insist(lambda: question(bucket), path)


def _open_to_write(path: str) -> tuple[Place, Any]:
    place = place_of(path)
    if place.scheme == "memory":
        open_memory(place.bucket)
    return place, client_of(place)


def _never_moves(path: str, target: str) -> AssertionError:
    return AssertionError(
        f"{shorten(path)} -> {shorten(target)}: nothing is moved in a bucket (`Store.moves`)"
    )
