"""Speed and memory of the ranking losses against their peers: `python -m benchmarks`."""
