"""What is kept of the compressed model: how it is written, counted on disk, read back and trusted."""
