"""What may follow pruning: lower precision, special kernels."""
