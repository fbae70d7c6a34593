"""A sampler behind HTTP: what waits is drawn together, by OpenAI's image interface and on a page."""
