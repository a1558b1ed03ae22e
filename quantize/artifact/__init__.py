"""Artifact folders: read back as a server would, and converted to other formats."""
