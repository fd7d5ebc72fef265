"""From Hydra's configuration to typed, validated parts; what a recipe may not do; --help."""
