"""The counters of a build as metrics of Ray, which its dashboard and any Prometheus show next to the actors.

They are of one process and one run, as all metrics are. What a corpus holds is in its log.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from ...schemas.manifest import Manifest
from ..corpus.events import Event

log = logging.getLogger(__name__)

COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "paracaption_stage_units": ("Units that passed through a stage.", ("subset", "stage")),
    "paracaption_stage_images": ("Images in the units that passed through a stage.", ("subset", "stage")),
    "paracaption_stage_regions": ("Regions that a stage worked on.", ("subset", "stage")),
    "paracaption_stage_asked": ("Regions that a stage's model was asked about.", ("subset", "stage")),
    "paracaption_stage_seconds": ("Seconds spent in a stage, over its actors.", ("subset", "stage")),
    "paracaption_stage_busy_seconds": ("Seconds of a stage in calls to its model.", ("subset", "stage")),
    "paracaption_stage_starts": ("Times that a stage's model was loaded.", ("subset", "stage")),
    "paracaption_stage_failures": ("Units on which a stage failed as a whole.", ("subset", "stage")),
    "paracaption_units": ("Units that were written.", ("subset",)),
    "paracaption_images": ("Images in the units that were written.", ("subset",)),
    "paracaption_regions_kept": ("Regions in the shards that were written.", ("subset",)),
    "paracaption_regions_dropped": ("Regions that were dropped, by stage/reason.", ("subset", "reason")),
}
"""Name -> what it counts, and its tags."""


class RayMetrics:
    """Counts the events of a worker and the units that the driver gets.

    Nothing depends on a metric, so an error in one is logged once and no more.

    Args:
        subset: that is built; a tag of every counter.
    """

    def __init__(self, subset: str):
        self.subset = subset
        self._is_broken = False

    def count_event(self, event: Event) -> None:
        """Count an event of a worker."""
        tags = {"subset": self.subset, "stage": event.stage}
        if event.what == "unit":
            counted = {
                "units": 1,
                "images": event.images,
                "regions": event.regions,
                "asked": event.asked,
                "seconds": event.seconds,
                "busy_seconds": event.busy,
            }
        else:
            counted = {"started": {"starts": 1}, "failed": {"failures": 1}}.get(event.what, {})
        self._add({f"paracaption_stage_{name}": value for name, value in counted.items()}, tags)

    def count_unit(self, manifest: Manifest) -> None:
        """Count a unit that is written."""
        tags = {"subset": self.subset}
        images, kept = len(manifest.images), manifest.kept
        self._add(
            {"paracaption_units": 1, "paracaption_images": images, "paracaption_regions_kept": kept}, tags
        )
        for reason, number in manifest.dropped.items():
            self._add({"paracaption_regions_dropped": number}, {**tags, "reason": reason})

    def _add(self, values: Mapping[str, float], tags: dict[str, str]) -> None:
        if self._is_broken:
            return
        try:
            for name, value in values.items():
                if value > 0:
                    _increase(name)(value, tags)
        except Exception:
            self._is_broken = True
            log.warning("Ray takes no metrics; the build goes on without them", exc_info=True)


@functools.cache
def _increase(name: str) -> Callable[[float, dict[str, str]], Any]:
    from ray.util.metrics import Counter

    description, tags = COUNTERS[name]
    return Counter(name, description=description, tag_keys=tags).inc
