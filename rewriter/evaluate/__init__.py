"""What a causal language model is worth, and what its cache costs: measured offline, whatever was done to the model."""
