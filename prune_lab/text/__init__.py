"""From corpora to token windows, in splits that never overlap."""
