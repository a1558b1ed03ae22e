"""Artifacts made ready for servers, and tried on them."""
