"""Lossy changes of a model, asked for by name: what an attention layer is, as weights, and how it is put back changed.

read_decoder    every attention of a decoder as weights, checked against what the model computes
calibrate       what a recipe learns from text
recipe          what is asked for: from a layer to its change
attention       the module that takes the place of an attention, and its memory
cache           what is kept from call to call
spans           which tokens heads see: kinds, plans (span_plan), attention (span_attention), caches (span_cache,
                span_rings), and how plans are found (span_profile, span_allocation)
convert         all of it in order
"""
