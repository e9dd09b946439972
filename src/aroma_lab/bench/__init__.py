"""`aroma bench`: what a training step costs, method by method."""
