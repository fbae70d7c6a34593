"""Image-text data: sources, the shard writer, and the streaming loader."""
