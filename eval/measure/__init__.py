"""The figures: the artifact on disk beside its original."""
