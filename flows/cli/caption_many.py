"""`paracaption caption --out`: many photos at once."""

from __future__ import annotations

from pathlib import Path

from ...pipeline.io.json_lines import read_lines
from ...schemas.decoding import DecodeOptions
from .. import stopping
from .progress import count, counting_parts

_GO_ON = "run the same command to continue"


def caption_many(
    model: Path,
    photos: str | None,
    masks: str,
    out: str,
    options: DecodeOptions,
    prompt: str | None,
    regions_per_call: int | None,
    batch_size: int,
    device: str,
    dtype: str,
) -> int:
    """Caption a folder or a corpus into a file of JSON lines, and print how many there are.

    Returns:
        The exit code: 1 if a photo cannot be used.

    Raises:
        ConfigError: the photos, the file or an option do not suit.
    """
    from ...model_training.decoding import caption_folder as many
    from ...model_training.decoding import caption_lines
    from ...model_training.decoding.region_captioner import RegionCaptioner, check_saved_model, resolve_place

    caption_lines.check_place(out, [model, photos, masks])
    check_saved_model(model)
    tasks = many.find_photos(photos, masks)
    _, computed_in = resolve_place(device, dtype)
    header = many.header_of(model, computed_in, options, prompt, regions_per_call, photos, masks)
    with caption_lines.only_writer(Path(out)):
        left = caption_lines.unfinished(tasks, Path(out), header)
        done, before = many.Captioned(0, 0, 0, 0), len(tasks) - len(left)
        if left:
            stopping.say(lambda: f"{_lines_of(out)} of {len(tasks):,} photos have a line; {_GO_ON}")
            captioner = RegionCaptioner.load(model, device, dtype)
            with counting_parts() as show:
                done = many.caption_folder(
                    captioner,
                    left,
                    Path(out),
                    options,
                    prompt=prompt,
                    regions_per_call=regions_per_call,
                    batch_size=batch_size,
                    progress=lambda number: show("photos", number, len(left)),
                )
    captioned = f"{count('photo', done.photos)} with {count('region', done.regions)} captioned"
    print(f"{captioned}, {before:,} done before: {out}")
    if done.left_out:
        print(f"{count('record', done.left_out)} of masks left out: see `left_out` in the lines")
    if done.failed:
        print(
            f"{count('photo', done.failed)} cannot be used: see `error` in the lines; a later run tries again"
        )
    return 1 if done.failed else 0


def _lines_of(out: str) -> str:
    return f"{len(read_lines(Path(out))):,}"
