"""The processes that compute, an expert shard's and an engine's, and how an engine reaches the shards."""
