"""Recipes of `latent.convert`, one file each: what is changed, what it costs, and when nothing is lost."""
