"""Causal language models: data, prompts, training, likelihoods."""
