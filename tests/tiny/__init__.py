"""Tiny random checkpoints in the published layouts, made from nothing in seconds."""
