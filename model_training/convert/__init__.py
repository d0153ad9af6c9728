"""Checkpoints from and to the published layouts."""
