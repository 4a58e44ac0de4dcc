"""Bytes from disks and buckets."""
