"""Captions the regions of one photo with a saved model; the answer as text, JSON, picture or trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...pipeline.io import draw, files
from ...schemas.errors import ConfigError
from . import read_regions, trace

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ...schemas.decoding import DecodeOptions
    from ..model.perceptiondlm import PerceptionDLM
    from ..model.processor import PerceptionDLMProcessor
    from .region_captioner import Captioned

DTYPES = ("auto", "float32", "bfloat16", "float16")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_INSTALL = "install the models' packages: pip install 'paracaption[models]'"


class Loaded(NamedTuple):
    """A model on its device, in eval mode, and its processor."""

    model: PerceptionDLM
    processor: PerceptionDLMProcessor


class Answer(NamedTuple):
    """The captions of a photo's regions, and how they came to be.

    Attributes:
        scene: photo and regions.
        captioned: captions in the order of the regions, with passes, tokens and seconds.
        tokens: of each caption's text.
        options: of the decoder.
        model: the folder, the device and the type of the weights.
    """

    scene: read_regions.Scene
    captioned: Captioned
    tokens: list[int]
    options: DecodeOptions
    model: dict[str, str]

    @property
    def tokens_per_forward(self) -> float:
        """Slots filled by a pass of the language model, over all regions."""
        return self.captioned.tokens / max(1, self.captioned.forwards)

    def marks(self) -> list[draw.Mark]:
        """The regions with their captions, to be drawn."""
        pairs = zip(self.scene.regions, self.captioned.captions, strict=True)
        return [draw.Mark(region.mask.rle, caption, region.label) for region, caption in pairs]


def check_outputs(
    picture: str | Path | None = None, steps: str | Path | None = None, record: str | Path | None = None
) -> None:
    """Whether what is asked for can be written, before a model is loaded for it.

    Args:
        picture: as `write_picture` takes it.
        steps: as `trace.write` takes it.
        record: of the JSON; "-" is none.

    Raises:
        ConfigError: an ending of no known format, or a folder that does not exist.
    """
    if steps is not None:
        trace.check_path(steps)
    if picture is not None and Path(picture).suffix.lower() not in _PICTURES:
        raise ConfigError(f"{picture}: a picture's name ends in {', '.join(_PICTURES)}")
    for path in (picture, record):
        if path is not None and str(path) != "-" and not Path(path).parent.is_dir():
            raise ConfigError(f"{path}: no such folder; make it first")


def load(folder: str | Path, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Load a saved model for captioning.

    Args:
        folder: as `save_pretrained` writes it.
        device: as torch names it; "auto": the GPU if there is one.
        dtype: one of `DTYPES`; "auto": bfloat16 on a GPU, float32 elsewhere.

    Raises:
        ConfigError: no such model, device or type, or torch is not installed.
    """
    check_folder(Path(folder))
    try:
        import torch
        from transformers.utils import logging

        from ..model.perceptiondlm import PerceptionDLM
        from ..model.processor import PerceptionDLMProcessor
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing; {_INSTALL}") from error
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r}; take one of {', '.join(DTYPES)}")
    logging.disable_progress_bar()
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        place = torch.device(chosen)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {chosen!r} cannot be used ({str(error).splitlines()[0]})") from error
    kind = ("bfloat16" if place.type == "cuda" else "float32") if dtype == "auto" else dtype
    try:
        processor = PerceptionDLMProcessor.from_pretrained(folder)
        model = PerceptionDLM.from_pretrained(folder, dtype=getattr(torch, kind))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: not readable ({str(error)[:300]}); save the model again") from error
    return Loaded(model.to(place).eval(), processor)


def check_folder(folder: Path) -> None:
    """Refuse what is not the folder of a saved model.

    Raises:
        ConfigError: names the file and the mend.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise ConfigError(f"{config}: no such file; give the folder of a saved model")
    try:
        kind = json.loads(config.read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{config}: not readable ({error}); save the model again") from error
    if kind != "perceptiondlm":
        raise ConfigError(f"{config}: a model of type {kind!r}, not 'perceptiondlm'; convert it first")


def describe(
    loaded: Loaded,
    scene: read_regions.Scene,
    options: DecodeOptions,
    regions_per_call: int | None = None,
) -> Answer:
    """Caption every region of a scene.

    Args:
        loaded: from `load`.
        scene: from `regions.read`.
        options: of the decoder.
        regions_per_call: regions of a sequence at most.

    Raises:
        ConfigError: an option that does not suit the model.
    """
    from .region_captioner import caption_images

    model, processor = loaded
    pairs = [(scene.pixels, [region.dense() for region in scene.regions])]
    captioned = caption_images(model, processor, pairs, options, regions_per_call=regions_per_call)[0]
    tokens = [len(processor.ids(caption)) for caption in captioned.captions]
    about = {
        "folder": str(model.name_or_path),
        "layout": model.config.layout,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return Answer(scene, captioned, tokens, options, about)


def trace_of(loaded: Loaded, answer: Answer, regions_per_call: int | None = None) -> trace.Trace:
    """Decode an answer's scene once more and keep every step: the answer's seconds are not the trace's."""
    from .region_captioner import caption_steps

    model, processor = loaded
    masks = [region.dense() for region in answer.scene.regions]
    steps = caption_steps(model, processor, answer.scene.pixels, masks, answer.options, regions_per_call)
    return trace.Trace(
        answer.scene.pixels,
        answer.marks(),
        list(steps),
        model.config.eot_token_id,
        Path(answer.scene.photo).name,
    )


def write_picture(answer: Answer, path: str | Path) -> None:
    """Draw the photo with masks and captions, and write it whole or not at all.

    Raises:
        ConfigError: no such picture format or folder.
    """
    title = Path(answer.scene.photo).name
    draw.save(draw.draw_image(answer.scene.pixels, answer.marks(), title=title), path)


def write_record(answer: Answer, path: str | Path) -> None:
    """Write `record` as a JSON file, whole or not at all."""
    with files.write_atomic(path) as file:
        file.write(to_json(answer).encode())


def to_json(answer: Answer) -> str:
    """`record` as text."""
    return json.dumps(record(answer), indent=2, ensure_ascii=False) + "\n"


def record(answer: Answer) -> dict[str, Any]:
    """Everything about an answer but its pixels and masks; `bbox` is x, y, width, height in pixels."""
    captioned = answer.captioned
    rows = zip(answer.scene.regions, captioned.captions, answer.tokens, strict=True)
    return {
        "photo": answer.scene.photo,
        "width": answer.scene.pixels.shape[1],
        "height": answer.scene.pixels.shape[0],
        "model": answer.model,
        "options": answer.options.stored(),
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
            }
            for number, (region, caption, tokens) in enumerate(rows, 1)
        ],
        "left_out": answer.scene.left_out,
        "forwards": captioned.forwards,
        "tokens": captioned.tokens,
        "tokens_per_forward": round(answer.tokens_per_forward, 3),
        "seconds": round(captioned.seconds, 4),
        "agreement": captioned.agreement,
    }


def render(answer: Answer) -> RenderableType:
    """The captions with their numbers, for a terminal, and a line of what they cost."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    for number, mark in enumerate(answer.marks()):
        red, green, blue = draw.color_of(mark, number)
        ink = "white" if draw.is_dark((red, green, blue)) else "black"
        caption = Text(mark.caption or "(no caption)", style="" if mark.caption else "dim")
        if mark.label:
            caption = Text.assemble((f"{mark.label}: ", "bold"), caption)
        table.add_row(Text(f" {number + 1} ", style=f"bold {ink} on rgb({red},{green},{blue})"), caption)
    return Group(table, Text(_cost(answer), style="dim"))


def _cost(answer: Answer) -> str:
    captioned, options = answer.captioned, answer.options
    num_regions = len(captioned.captions)
    device = answer.model["device"]
    line = (
        f"{num_regions} region{'s' * (num_regions != 1)}, {captioned.forwards} forwards, "
        f"{answer.tokens_per_forward:.1f} tokens a forward, {captioned.seconds:.2f} s on {device} "
        f"({options.strategy}, cache {options.cache})"
    )
    if captioned.agreement is not None:
        line += f"; {captioned.agreement:.1%} of the tokens as without a cache"
    return line
