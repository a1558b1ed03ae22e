"""Number types: what a recipe calls them, and rounding onto them; the record every rounder returns."""
