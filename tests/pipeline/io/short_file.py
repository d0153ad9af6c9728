"""A file on a disk that is almost full."""

from typing import IO, Any


class ShortFile:
    """Takes the first nine bytes of a write; else the file it stands for."""

    def __init__(self, file: IO[bytes]):
        self.file = file

    def write(self, data: bytes) -> int:
        return self.file.write(data[:9])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)
