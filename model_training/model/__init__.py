"""The network and what it reads: configuration, layout, processor, attention, LLaDA and PerceptionDLM."""
