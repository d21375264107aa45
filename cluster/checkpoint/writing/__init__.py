"""Writes checkpoints made from other checkpoints, in the published layout. Nothing here holds a whole model."""
