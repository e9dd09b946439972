"""Search: many trials of one method on one task, shared by processes and machines through an Optuna study."""
