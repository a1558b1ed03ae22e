"""Runs as releases: stages done once, sweeps, the run to take, publishing, reproducing."""
