"""Exports artifacts for servers, and tests them there."""
