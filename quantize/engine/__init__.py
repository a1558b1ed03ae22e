"""A run: from a job that fits its model to the artifact folder, one decoder block at a time."""
