"""Recipes that ship with quantpress, one YAML file each, in folders by what they are for."""
