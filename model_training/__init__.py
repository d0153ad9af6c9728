"""PerceptionDLM: a diffusion language model that captions many masked regions of one image in parallel."""
