"""prune_lab: configuration-driven experiments in compressing language models."""

__version__ = "0.1.0"
