"""The report: runs of any sweeps beside each other, by any pair of metrics, as one HTML file and a PNG."""
