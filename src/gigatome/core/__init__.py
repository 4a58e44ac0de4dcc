"""Errors, geometry, seeds, logs and paths: what every other layer stands on."""
