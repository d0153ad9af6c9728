"""Training data: batches from committed shards and conversations, each region exactly once an epoch.

loader = Loader([CorpusSource("out")], processor, DataOptions(), rank, world_size, Workers(8))
for batch in loader:  # one epoch
    loss = ...(batch.tokens, batch.images, batch.label_BL, batch.weight_E)
    checkpoint = {"loader": loader.state_dict(), ...}
"""

from .corpus import unfinished
from .loader import Loader
from .options import ConversationSource, CorpusSource, DataOptions, Workers
from .samples import FILLER, Skipped, TrainBatch

__all__ = [
    "FILLER",
    "ConversationSource",
    "CorpusSource",
    "DataOptions",
    "Loader",
    "Skipped",
    "TrainBatch",
    "Workers",
    "unfinished",
]
