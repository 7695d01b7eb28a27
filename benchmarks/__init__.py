"""Benchmarks of streamguard against named peers, in the same run: `python -m benchmarks`."""
