"""Recipes that ship with quantpress, one YAML file a supported combination."""
