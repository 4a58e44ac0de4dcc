"""Whole-slide images: opening, reading, listing and making them."""
