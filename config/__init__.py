"""Recipes (one a file: plain assignments) and `settings.py`, which loads them."""
