"""Trials: one run of one method on one task, in a folder of its own, that a kill cannot spoil."""
