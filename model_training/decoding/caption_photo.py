"""The captions of one photo's regions, as text, JSON, picture or trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...pipeline.io import draw, files
from ...pipeline.models.batching import Batches
from ...schemas.errors import ConfigError
from .fitting import caption_each
from .read_regions import PhotoRegions
from .trace import Trace

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ...schemas.decoding import DecodeOptions
    from .region_captioner import RegionCaptioner, RegionCaptions

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_TRACES = (".gif", ".html")


class CaptionedPhoto(NamedTuple):
    """A photo with the captions of its regions, and how they came to be.

    Attributes:
        photo: the photo and its regions.
        found: the captions in the order of the regions, and what they cost.
        tokens: how many tokens the text of each caption has.
        options: how the captions were decoded, without the cache "auto" where it means "approximate".
        model: folder, layout, device and type of the model.
        prompts: what each region was asked; empty if all were asked what the model was trained with.
    """

    photo: PhotoRegions
    found: RegionCaptions
    tokens: list[int]
    options: DecodeOptions
    model: dict[str, str]
    prompts: Sequence[str] = ()

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that one forward pass of the language model decides, over all regions."""
        return self.found.tokens / max(1, self.found.forwards)

    def overlays(self) -> list[draw.Overlay]:
        """The regions with their captions, as they are drawn."""
        pairs = zip(self.photo.regions, self.found.captions, strict=True)
        return [draw.Overlay(region.mask.rle, caption, region.label) for region, caption in pairs]


def check_outputs(
    picture: str | Path | None = None, trace: str | Path | None = None, record: str | Path | None = None
) -> None:
    """Refuse outputs that cannot be written, before a model is loaded for them.

    Args:
        picture: path for `write_picture`.
        trace: path for `write_trace`.
        record: path of a JSON file; "-" stands for the terminal.

    Raises:
        ConfigError: a name ends in no known format, a folder does not exist, or the path is one.
    """
    if trace is not None:
        _check_trace(trace)
    if picture is not None and Path(picture).suffix.lower() not in _PICTURES:
        raise ConfigError(f"{picture}: a picture's name ends in {', '.join(_PICTURES)}")
    for path in (picture, trace, record):
        if path is None or str(path) == "-":
            continue
        if not Path(path).parent.is_dir():
            raise ConfigError(f"{Path(path).parent}: no such folder; make it first")
        if Path(path).is_dir():
            raise ConfigError(f"{path}: is a folder; name a file in it")


def caption_regions(
    captioner: RegionCaptioner,
    photo: PhotoRegions,
    options: DecodeOptions,
    regions_per_call: int | None = None,
    prompts: Sequence[str] = (),
    batch_size: int = 8,
) -> CaptionedPhoto:
    """Caption every region of a photo.

    Args:
        captioner: the model.
        photo: the photo and its regions.
        options: how captions are decoded.
        regions_per_call: the most regions that share a sequence; by default as many as the model can.
        prompts: what the regions are asked: one text for all, one for each, or none for the model's own.
        batch_size: sequences that are decoded at once; halved when memory runs out.

    Raises:
        ConfigError: an option does not suit the model, or there are not as many prompts as regions.
        OutOfMemory: one sequence does not fit.
    """
    num_regions = len(photo.regions)
    asked = [*prompts] * (num_regions if len(prompts) == 1 else 1)
    [(_, found)] = caption_each(
        captioner,
        [photo],
        lambda each: (None, each.pixels, each.masks()),
        Batches(batch_size, "captions: sequences of regions"),
        options,
        prompt=asked or None,
        regions_per_call=regions_per_call,
    )
    return about_captions(captioner, photo, found, options, asked)


def about_captions(
    captioner: RegionCaptioner,
    photo: PhotoRegions,
    found: RegionCaptions,
    options: DecodeOptions,
    prompts: Sequence[str] = (),
) -> CaptionedPhoto:
    """A photo with captions of its regions that a captioner has made.

    Args:
        captioner: the captioner.
        photo: the photo and its regions.
        found: the captions.
        options: how they were decoded.
        prompts: what each region was asked; none for the model's own prompt.
    """
    from .buckets import resolve_options

    model = captioner.model
    about = {
        "folder": str(model.name_or_path),
        "layout": model.config.layout,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    tokens = [len(captioner.processor.tokenize(caption)) for caption in found.captions]
    return CaptionedPhoto(photo, found, tokens, resolve_options(model, options), about, prompts)


def trace_photo(
    captioner: RegionCaptioner,
    captioned: CaptionedPhoto,
    regions_per_call: int | None = None,
    batch_size: int = 8,
) -> Trace:
    """Decode a captioned photo once more and keep every step, which takes longer than the captions did.

    Raises:
        OutOfMemory: one sequence does not fit.
    """
    photo = captioned.photo
    steps = captioner.record_steps(
        photo.pixels,
        photo.masks(),
        captioned.options,
        prompt=captioned.prompts or None,
        regions_per_call=regions_per_call,
        batch_size=batch_size,
    )
    eot = captioner.model.config.eot_token_id
    return Trace(photo.pixels, captioned.overlays(), steps, eot, Path(photo.name).name)


def write_picture(captioned: CaptionedPhoto, path: str | Path) -> None:
    """Draw the photo with masks and captions; the file appears whole or not at all.

    Raises:
        ConfigError: the name ends in no known format, or the folder does not exist.
    """
    title = Path(captioned.photo.name).name
    draw.save_picture(draw.draw_image(captioned.photo.pixels, captioned.overlays(), title=title), path)


def write_trace(trace: Trace, path: str | Path) -> None:
    """Write a trace as a GIF or as a page, by the name's ending; the file appears whole or not at all.

    Raises:
        ConfigError: the name ends in neither .gif nor .html, or the folder does not exist.
    """
    from .trace_gif import render_gif
    from .trace_page import render_page

    _check_trace(path)
    data = render_gif(trace) if Path(path).suffix.lower() == ".gif" else render_page(trace).encode()
    with files.write_atomic(path) as file:
        file.write(data)


def _check_trace(path: str | Path) -> None:
    path = Path(path)
    if path.suffix.lower() not in _TRACES:
        raise ConfigError(f"{path}: a trace's name ends in {' or '.join(_TRACES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent}: no such folder; make it first")


def write_record(captioned: CaptionedPhoto, path: str | Path) -> None:
    """Write the record as a JSON file, which appears whole or not at all."""
    with files.write_atomic(path) as file:
        file.write(to_json(captioned).encode())


def to_json(captioned: CaptionedPhoto) -> str:
    """The record as JSON text."""
    return json.dumps(to_record(captioned), indent=2, ensure_ascii=False) + "\n"


def to_record(captioned: CaptionedPhoto) -> dict[str, Any]:
    """A captioned photo without its pixels and masks; `bbox` is x, y, width, height in pixels."""
    found = captioned.found
    rows = zip(captioned.photo.regions, found.captions, captioned.tokens, strict=True)
    return {
        "photo": captioned.photo.name,
        "width": captioned.photo.pixels.shape[1],
        "height": captioned.photo.pixels.shape[0],
        "model": captioned.model,
        "options": captioned.options.stored(),
        "regions": [
            {
                "number": number,
                "label": region.label,
                "caption": caption,
                "tokens": tokens,
                "area": region.mask.area,
                "bbox": list(region.mask.bbox),
                "source": region.source,
                "corpus_caption": region.caption,
                **({"prompt": captioned.prompts[number - 1]} if captioned.prompts else {}),
            }
            for number, (region, caption, tokens) in enumerate(rows, 1)
        ],
        "left_out": captioned.photo.left_out,
        "forwards": found.forwards,
        "tokens": found.tokens,
        "tokens_per_forward": round(captioned.tokens_per_forward, 3),
        "seconds": round(found.seconds, 4),
        "agreement": found.agreement,
    }


def render_captions(captioned: CaptionedPhoto) -> RenderableType:
    """The captions with their numbers, for a terminal, and a line of what they cost."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    for number, overlay in enumerate(captioned.overlays()):
        red, green, blue = draw.color_of(overlay, number)
        ink = "white" if draw.is_dark((red, green, blue)) else "black"
        caption = Text(overlay.caption or "(no caption)", style="" if overlay.caption else "dim")
        if overlay.label:
            caption = Text.assemble((f"{overlay.label}: ", "bold"), caption)
        table.add_row(Text(f" {number + 1} ", style=f"bold {ink} on rgb({red},{green},{blue})"), caption)
    return Group(table, Text(_cost(captioned), style="dim"))


def _cost(captioned: CaptionedPhoto) -> str:
    found, options = captioned.found, captioned.options
    num_regions = len(found.captions)
    device = captioned.model["device"]
    line = (
        f"{num_regions} region{'s' * (num_regions != 1)}, {found.forwards} forwards, "
        f"{captioned.tokens_per_forward:.1f} tokens a forward, {found.seconds:.2f} s on {device} "
        f"({options.strategy}, cache {options.cache})"
    )
    if found.agreement is not None:
        line += f"; {found.agreement:.1%} of the tokens as without a cache"
    return line
