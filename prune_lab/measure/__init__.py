"""What a model costs and what it is worth: quality, size, memory, latency."""
