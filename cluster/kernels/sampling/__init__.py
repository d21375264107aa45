"""Choosing a token for each row of logits: plain, batched and native. Knows no sequences."""
