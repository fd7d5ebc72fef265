"""Commands beside the run: cache, suggest, sync; and what writes docs/keys.md."""
