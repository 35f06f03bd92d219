"""latent: finds every attention in a PyTorch model, proves what it does, and rewrites it."""
