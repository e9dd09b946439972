"""Grids: methods × tasks × seeds, run in worker processes that a kill cannot spoil. Importing this is light."""
