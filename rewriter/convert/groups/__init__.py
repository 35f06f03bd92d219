"""Layers that share one token factor: which layers, and what a cache keeps for them."""
