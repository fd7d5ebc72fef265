"""Pruning methods, one file each: a score, a structure and a selection group."""
