"""Measurements: `python -m benchmarks` runs all, `python -m benchmarks.<name>` one. Never part of the tests."""
