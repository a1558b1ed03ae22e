"""A model as it lies on disk and as transformers runs it, one decoder block at a time."""
