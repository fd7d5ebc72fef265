"""Where results go: MLflow, or nowhere but the run's own folder."""
