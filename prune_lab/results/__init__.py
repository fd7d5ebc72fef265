"""What a run found: figures by name, its record, and what a person sees of it."""
