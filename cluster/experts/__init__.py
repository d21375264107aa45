"""Routed experts: what a shard computes, which shard holds what, and how rows get there. Knows no Ray."""
