"""Pruning methods, one file each: keys, checks and the loop. What they are made of is in pruning/."""
