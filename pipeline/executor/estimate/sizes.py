"""How much is to be built: images and regions of each subset."""

from __future__ import annotations

import math

import msgspec

from ....schemas.config import BuildConfig
from ....schemas.errors import ConfigError, IntegrityError
from ...corpus.work_list import is_current
from ...corpus.work_list_summary import load_work_list
from ...io.location import locate
from ...sources.registry import find_source, open_source
from .rates import Rates


class Size(msgspec.Struct, frozen=True):
    """A subset's images and the regions that its source declares."""

    images: int
    regions: int


def choose_sizes(config: BuildConfig, rates: Rates, given: list[str], count_sources: bool) -> dict[str, Size]:
    """The size of each subset: as given, else as the paper's corpus has it, else counted in the sources.

    Args:
        config: names the subsets.
        rates: the pilot's regions per image are used where only images are known.
        given: the values of `--images`, such as "coconut=334000/3400000" or "coconut=334000".
        count_sources: count the images of the configured sources instead of taking the paper's sizes.

    Raises:
        ConfigError: a value of `given` is malformed or names a subset that is not configured, or a source
            cannot be listed.
    """
    if given:
        return dict(_parse_size(config, rates, text) for text in given)
    return {
        subset: (None if count_sources else paper_size(config, subset))
        or _with_regions(rates, subset, _count_images(config, subset))
        for subset in config.subsets
    }


def paper_size(config: BuildConfig, subset: str) -> Size | None:
    """What the paper's corpus has of the kind of source that only this subset has; None if there is none."""
    kinds = {name: {each["source"] for each in each.sources} for name, each in config.subsets.items()}
    own = kinds.pop(subset)
    if len(own) > 1 or any(own & others for others in kinds.values()):
        return None
    size = find_source(*own).paper_size
    return None if size is None else Size(*size)


def _parse_size(config: BuildConfig, rates: Rates, text: str) -> tuple[str, Size]:
    subset, _, numbers = text.partition("=")
    images, _, regions = numbers.replace(",", "").replace("_", "").partition("/")
    if subset not in config.subsets:
        raise ConfigError(f"--images {text}: {subset!r} is not configured, only {', '.join(config.subsets)}")
    if not images.isdigit() or (regions and not regions.isdigit()):
        raise ConfigError(f"--images {text}: expected SUBSET=IMAGES or SUBSET=IMAGES/REGIONS")
    if regions:
        return subset, Size(int(images), int(regions))
    return subset, _with_regions(rates, subset, int(images))


def _with_regions(rates: Rates, subset: str, images: int) -> Size:
    """With as many regions per image as the pilot had."""
    measured = rates.subsets.get(subset)
    if measured is None or not measured.images:
        raise ConfigError(
            f"{subset}: the rates do not say how many regions an image has; "
            f"give --images {subset}=IMAGES/MASKS"
        )
    return Size(images, math.ceil(images * measured.regions / measured.images))


def _count_images(config: BuildConfig, subset: str) -> int:
    """From the work list if there is one of the whole source as it is today; else the source is listed."""
    source, gone = open_source(config, subset), 0
    try:
        planned = load_work_list(locate(config.out) / subset)
        gone = planned.gone
        if "limit" not in planned.fingerprint and is_current(planned, source, config):
            return planned.num_images
    except IntegrityError:  # nothing is planned yet
        pass
    return gone + sum(1 for _ in source.catalog())
