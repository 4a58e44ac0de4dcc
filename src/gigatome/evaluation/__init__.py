"""Splits, probes, metrics and reports at slide level."""
