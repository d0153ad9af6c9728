"""What would make a build faster: sentences under an estimate."""

from __future__ import annotations

from collections.abc import Sequence

from .predict import Estimate

_WORTH = 0.95
"""A change is suggested if the build then takes at most this share of the time."""


def advise(configured: Estimate, balanced: Estimate, together: Estimate | None = None) -> list[str]:
    """Sentences on what to change; none if nothing saves a twentieth of the time.

    Args:
        configured: the build within the configured `concurrency`.
        balanced: with the GPUs shared out for balance.
        together: with as many GPUs as hold the pools of all subsets at once; None if they are held anyway.
    """
    found = []
    if configured.gpus and balanced.wall_s <= _WORTH * configured.wall_s:
        shares = listed([f"{short(use.title)} {use.gpus:g}" for use in balanced.pools if use.gpus])
        found.append(
            f"Give {shares} of the {balanced.gpus:g} GPUs: the build then takes "
            f"{duration(balanced.wall_s)} instead of {duration(configured.wall_s)}."
        )
    if together is not None and together.wall_s <= _WORTH * configured.wall_s:
        found.append(
            f"With {together.gpus:g} GPUs the subsets are built side by side, in {duration(together.wall_s)} "
            f"instead of {duration(configured.wall_s)}."
        )
    if (shared := _share_a_gpu(configured)) is not None:
        found.append(shared)
    return found


def _share_a_gpu(estimated: Estimate) -> str | None:
    """Lets two models that are mostly idle share a GPU, and gives the free one to the bottleneck.

    Of all pairs with a GPU each, it takes the one that is busiest together, with a tenth of the time spare.
    """
    if len(estimated.streams) != 1:
        return None
    (stream,) = estimated.streams
    others = [use for use in estimated.pools if use.title != stream.bottleneck]
    single = [use for use in others if use.actors == use.gpus == 1]
    slowest = next((use for use in estimated.pools if use.title == stream.bottleneck), None)
    if slowest is None or slowest.gpus != slowest.actors:
        return None
    then_s = slowest.busy_s / (slowest.actors + 1)
    pairs = [
        (one, other)
        for number, one in enumerate(single)
        for other in single[number + 1 :]
        if one.busy_s + other.busy_s <= 0.9 * then_s
    ]
    if not pairs or then_s > _WORTH * slowest.busy_s / slowest.actors:
        return None
    one, other = max(pairs, key=lambda pair: pair[0].busy_s + pair[1].busy_s)
    names = listed([short(one.title), short(other.title)])
    saved_s = slowest.busy_s / slowest.actors - then_s
    return (
        f"If {names} fit into the memory of one GPU together, give each half of one (`num_gpus: 0.5`), and "
        f"{short(slowest.title)} {slowest.actors + 1}: that saves about {duration(saved_s)}."
    )


def short(title: str) -> str:
    """The title of a pool as people read it: `subsets.mine.recipe.again.judge` is `again.judge`."""
    return " + ".join(place.rpartition(".recipe.")[2] for place in title.split("+"))


def listed(words: Sequence[str]) -> str:
    """The words as a list in a sentence."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def duration(seconds: float) -> str:
    """In the unit that a planner thinks in."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"
