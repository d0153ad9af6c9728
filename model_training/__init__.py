"""PerceptionDLM: captions many regions of one image in parallel with a masked diffusion language model."""
