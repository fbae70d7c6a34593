"""Feature extractors and metrics."""
