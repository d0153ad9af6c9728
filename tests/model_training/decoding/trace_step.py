"""The trace of one decode step, from the device that pretends.

    python -m tests.model_training.decoding.trace_step

Everything that a GPU would be asked to do from one wait to the next, in its order. Operations that follow
each other several times are one entry.
"""

import sys
from itertools import groupby
from textwrap import wrap

from paracaption.model_training.decoding.sampler import Decoder
from paracaption.model_training.model.batch import collate
from paracaption.schemas.decoding import DecodeOptions
from tests.device import Event, pretend
from tests.model_training.tiny_models import examples, lively


def one_step() -> list[Event]:
    """What happens in a step in the middle of a decode of two images with 6 and 3 regions of 8 tokens."""
    model, processor = lively(layout="corrected")
    batch = collate(examples(processor, [6, 3], slots=8))
    with pretend() as device:
        model.to(device.name)
        decoder = Decoder(model)
        with device.counting() as counts:
            decoder.decode(batch, DecodeOptions(max_new_tokens=8, steps=8, early_exit=False))
    waits = [number for number, event in enumerate(counts.events) if event.kind == "sync"]
    return counts.events[waits[4] : waits[5]]


def main() -> None:
    """Print it."""
    entries = []
    for (kind, operation), run in groupby(one_step(), key=lambda event: (event.kind, event.operation)):
        number = len(list(run))
        name = operation if kind == "launch" else f"[{kind}: {operation}]"
        entries.append(f"{name} x{number}" if number > 1 else name)
    sys.stdout.write("\n".join(wrap(", ".join(entries), 110)) + "\n")


if __name__ == "__main__":
    main()
