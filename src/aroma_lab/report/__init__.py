"""Runs as pandas frames, and the tables and figures made of them: every number traceable, no failure left out."""
