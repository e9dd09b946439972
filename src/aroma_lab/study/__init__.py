"""Grids and searches. Importing this is light."""
