"""Checkpoints by their names on the hub: one commit's files, each fetched when it is needed."""
