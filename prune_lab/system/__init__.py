"""Files, processes, devices and terminals: what is not about pruning."""
