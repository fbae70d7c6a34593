"""Questions about a trained sampler: reconstruct, over training, understanding, compare."""
