"""Several runs: their record, table, plot and search."""
