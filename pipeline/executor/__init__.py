"""Builds a corpus: `driver` owns the order of the steps, an engine runs the units.

`ray_data` is the default engine and spreads over machines; `local` is the same worker in this process.
"""
