"""The version of this tool."""

__version__ = "0.2.0"
