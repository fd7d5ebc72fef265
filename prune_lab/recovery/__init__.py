"""Recovery: training that restores quality after pruning."""
