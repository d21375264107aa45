"""Checkpoints on disk: names, reader, generation defaults, and made-up ones to run without a download."""
