"""Grids and searches as Optuna studies. Importing this is light."""
