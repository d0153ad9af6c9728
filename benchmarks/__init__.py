"""Measurements: `python -m benchmarks` runs all, `python -m benchmarks.<name>` one. Never a test."""
