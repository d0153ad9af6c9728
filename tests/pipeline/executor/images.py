"""Images of the executor's tests, and the note of a worker that died."""

from paracaption.pipeline.executor.in_flight import InFlight
from paracaption.schemas.records import Blob, ImageRecord, Region, Rle


def image(key: str, num_regions: int = 1) -> ImageRecord:
    regions = [Region(id=i, rle=Rle((4, 6), "0h0")) for i in range(num_regions)]
    return ImageRecord(key, "coconut", Blob("/a.jpg"), 6, 4, "jpeg", regions=regions)


def images(count: int) -> list[ImageRecord]:
    return [image(f"i{number}") for number in range(count)]


def die(folder, working: list[str], attempts: int = 2, unit: str = "u", shared=None) -> None:
    """Leave what a worker leaves that dies while it works on these images."""
    in_flight = InFlight(folder, unit, attempts, shared).__enter__()
    with in_flight.batch(working):
        note = in_flight.path.read_bytes()
    in_flight.path.write_bytes(note)
