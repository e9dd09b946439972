"""Grids of trials. Importing this is light."""
