"""Slide-level models on bags of embeddings, and the loop that trains them."""
