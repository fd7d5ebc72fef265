"""Models larger than memory: decoder blocks' weights stay on disk and are loaded one block at a time."""
