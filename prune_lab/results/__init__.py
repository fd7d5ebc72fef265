"""Results of runs: metrics by name, summaries, warnings, tables and plots."""
