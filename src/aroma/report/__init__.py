"""Reports to look at: one HTML file that needs no network, of a training run or of a comparison."""
