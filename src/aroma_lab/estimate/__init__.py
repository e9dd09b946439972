"""What a fine-tuning takes, on paper: memory, communication and time of models that fit nowhere here."""
