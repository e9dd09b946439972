"""Ways to drive a growing adapter: the Hugging Face Trainer, TRL, or a loop of one's own."""
