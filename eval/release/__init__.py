"""Whole releases: runs, sweeps, the recommendation, publishing and reproducing."""
