"""The laboratory: recipes, experiments, tables and figures, benchmarks, around the library `aroma`."""
