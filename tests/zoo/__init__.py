"""A zoo of tiny models with random weights, for sweeping a compiler over every way attention is written.

shrink.py       any transformers configuration, made tiny by the meaning of its attributes
rules.py        which attribute becomes which small number
layers.py       the fewest layers that keep every kind of layer
overrides.py    what the rules cannot know, one model type a row, with the reason
build.py        model type -> model and inputs
count.py        how many attentions a forward executes
named.py        the architectures whose attention count is known in advance
handwritten.py  models as people write them without a library
survey.py       `python -m zoo.survey`: the whole zoo in one table
"""
