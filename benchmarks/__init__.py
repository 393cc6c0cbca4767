"""Measures the server against the floor: what no turn can avoid (`python -m benchmarks.run`)."""
