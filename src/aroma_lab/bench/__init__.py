"""`aroma bench`: what a training step costs, in time and memory, method by method."""
