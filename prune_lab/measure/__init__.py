"""Measurements of a model: quality, size, memory, latency."""
