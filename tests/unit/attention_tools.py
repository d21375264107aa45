"""Attention over a cache as a layer calls it."""

from cluster.kernels.attention import make_attention


def paged_attention(q, k_cache, v_cache, batch, *, scale, window):
    """By the kernel that is chosen for the cache."""
    return make_attention(k_cache, q.shape[1]).plan(batch).attend(q, k_cache, v_cache, scale=scale, window=window)
