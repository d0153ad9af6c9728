"""The decisions: pure functions from evidence to keep, or drop with a reason. No I/O, no ray, no torch."""
