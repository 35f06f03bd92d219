"""Lossy changes of a model, asked for by name: what an attention layer is, as weights, and how it is put back changed.

read_decoder    every attention of a decoder as weights, checked against what the model computes
calibrate       what a recipe learns from text
recipe          what is asked for: from layers to their changes
attention       the module that takes the place of an attention: memory (keys, values), reach (which of them), gate
cache           what is kept from call to call
store           what is written to disk
convert         all of it in order

spans and groups are what recipes of heads and of several layers have in common.
"""
