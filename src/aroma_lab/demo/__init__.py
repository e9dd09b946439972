"""The demo: AROMA on real articles with a real model, offline."""
