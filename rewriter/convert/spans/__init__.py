"""Heads that see a part of the earlier tokens.

span         which tokens one head sees, by position
plan         spans of every head of a model, as data and as YAML
profile      what each head loses by a shorter span, on text
allocation   spans under a budget, by integer programming
search       all of these in order
attention    attention of the heads of one span, without the square mask
cache        what a growing cache keeps for them
rings        the same in fixed buffers
"""
