"""Post-compression after pruning: quantization, 2:4 kernels."""
