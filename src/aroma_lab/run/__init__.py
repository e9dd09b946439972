"""One run: a trial from its description to its result, exact across kills."""
