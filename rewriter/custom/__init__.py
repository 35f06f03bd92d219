"""Rewrites as two functions of plain PyTorch, and their checks."""
