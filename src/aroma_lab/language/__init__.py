"""Causal language models: instruction data, prompts, answers, generation."""
