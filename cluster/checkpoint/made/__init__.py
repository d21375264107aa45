"""Checkpoints with random weights, for demos, benchmarks and tests: nothing is downloaded."""
