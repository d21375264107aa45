"""Routed experts: a shard's products, the plan of who has which experts, the way of rows to them. Knows no Ray."""
