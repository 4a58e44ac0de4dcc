"""Embeddings of slides: extraction and storage."""
