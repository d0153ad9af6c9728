"""Masks in, verified region captions out, and the parallel region captioner trained from them."""
