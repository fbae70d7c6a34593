"""The one shared engine: checkpoints, the training loop, sampling."""
