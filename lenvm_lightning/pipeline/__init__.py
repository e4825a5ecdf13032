"""Recipes: read and checked, then their stages run: sample, fit, variants, evaluate."""
