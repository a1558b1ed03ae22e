"""Measurements of an artifact on disk against its original."""
