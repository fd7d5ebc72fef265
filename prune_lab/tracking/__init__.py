"""Tracking of results: in MLflow, or in the run's own folder alone."""
