"""From a trained model to captions: the sampler, the region captioner, and readers of regions."""
