"""Parts of pruning methods: calibration, scores, selection, allocation, surgery, masks. The methods are in methods/."""
