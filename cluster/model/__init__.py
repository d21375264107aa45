"""The models that an engine computes, all but their routed experts. Knows no network, no Ray and no shards."""
