"""Writes the tables of README.md and docs/ from the results files of the recipes: `python -m recipes.tables`."""
