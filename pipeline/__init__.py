"""The machinery: sources, models, stages, the stream on Ray Data, shards, and the corpus."""
