"""`paracaption caption --out`: many photos at once."""

from __future__ import annotations

from pathlib import Path

from ...schemas.decoding import DecodeOptions
from .progress import counting_parts


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
        done = many.Captioned(0, 0, 0)
        if left:
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
    before = len(tasks) - len(left)
    print(f"{done.photos:,} photos with {done.regions:,} regions captioned, {before:,} done before: {out}")
    if done.failed:
        print(f"{done.failed:,} photos cannot be used: see `error` in their lines; a later run tries again")
    return 1 if done.failed else 0
