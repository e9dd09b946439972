"""`aroma estimate`: the memory of a fine-tuning, and on how many of which devices it fits."""
