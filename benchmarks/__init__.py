"""What is measured, and how: ``python -m benchmarks.NAME`` from the root of the repository."""
