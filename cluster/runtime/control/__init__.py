"""The expert controller's process: makes, watches and replaces the shards, moves experts between them."""
