"""Backends that need no weights and no GPU: for the demo, the tests and a first look."""
