"""Questions about a sampler: plan, before it is trained; reconstruct, over training, and so on after."""
