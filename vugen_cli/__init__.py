"""VUGEN: turn any vision-language model into an image generator."""

__version__ = "0.1.0"
