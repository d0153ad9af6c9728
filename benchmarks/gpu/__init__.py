"""Everything that waits for a GPU, in under 8 minutes: see docs/gpu-benchmark.md."""
