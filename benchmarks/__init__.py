"""One command that says what merging costs beside the least that it could: `python -m benchmarks`."""
