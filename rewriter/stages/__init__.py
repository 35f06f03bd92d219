"""A graph at a stage as plain data, and what is made of it: text, Python, drawings, comparisons."""
