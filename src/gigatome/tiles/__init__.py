"""Squares of a stated resolution: grids, random samplers and streams."""
