"""Tensor functions, with a plain torch reference beside each fast one. Knows no checkpoint, no network."""
