"""A small world with known truth, in which learning can be shown on a CPU."""
