"""Weights in fewer bits: quantized, 2:4 and bitmask layouts, in memory and on disk."""
