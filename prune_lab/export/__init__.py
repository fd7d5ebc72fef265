"""Exports of the compressed model: how they are written, counted on disk, read back and trusted."""
