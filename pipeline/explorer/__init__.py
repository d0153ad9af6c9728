"""A corpus as web pages: what came through, what was dropped and why, and whether the thresholds are right.

`catalog` answers questions about the committed ledgers through DuckDB, `pictures` draws, `server` has the
pages. Nothing in a request is ever a path: images are addressed by subset and key and looked up.
"""
