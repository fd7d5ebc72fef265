"""What pruning methods are made of: scores, selection, surgery, masks."""
