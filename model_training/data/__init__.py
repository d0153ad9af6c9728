"""Training data: batches from committed shards and conversations, each region exactly once an epoch.

loader = Loader(config.corpora, processor, config.data, config.seed, rank, world_size)
for batch in loader:  # one epoch
    loss = ...(batch.tokens, batch.images, batch.label_BL, batch.weight_E)
    checkpoint = {"loader": loader.state_dict(), ...}
"""
