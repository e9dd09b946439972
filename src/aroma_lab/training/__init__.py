"""The one training loop: what a job is, and the Trainer that any method goes through."""
