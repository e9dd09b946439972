"""Experiments: recipes, data, metrics, runs, figures, and the demo."""
