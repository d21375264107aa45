"""A layer's small steps between its products, each in one launch where torch takes several.

T: tokens, H: hidden size, Q: query heads, KV: key/value heads, D: head size, E: routed experts, K: experts a token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(out, x, weight, hidden, eps, N: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    value = tl.load(x + row * hidden + columns, mask=columns < hidden, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / hidden + eps)
    normed = (value * scale).to(out.dtype.element_ty)
    factor = tl.load(weight + columns, mask=columns < hidden, other=0.0)
    tl.store(out + row * hidden + columns, factor.to(tl.float32) * normed.to(tl.float32), mask=columns < hidden)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[T, H]: computed in float32, cast back, then the weight."""
    x = x.contiguous()
    out = torch.empty_like(x)
    hidden = x.shape[-1]
    _rms_norm[x.numel() // hidden,](out, x, weight, hidden, eps, N=triton.next_power_of_2(hidden), num_warps=8)
    return out


@triton.jit
def _rotate_and_write(
    q, k_cache, v_cache, qkv, cos, sin, slots, num_heads, num_kv_heads, head_dim, slot_stride, head_stride,
    HALF: tl.constexpr,
):  # fmt: skip
    """One head of one token: a query's and a key's is rotated; keys and values go to their slot."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims, half = tl.arange(0, HALF), head_dim // 2
    mask = dims < half
    place = qkv + (token * (num_heads + 2 * num_kv_heads) + head) * head_dim + dims
    first, second = tl.load(place, mask=mask), tl.load(place + half, mask=mask)
    slot = tl.load(slots + token) * slot_stride
    if head >= num_heads + num_kv_heads:
        target = v_cache + slot + (head - num_heads - num_kv_heads) * head_stride + dims
    else:
        angle = token * head_dim + dims
        a, b = first.to(tl.float32), second.to(tl.float32)
        # The cosines of both halves are the same numbers.
        c, s = tl.load(cos + angle, mask=mask).to(tl.float32), tl.load(sin + angle, mask=mask).to(tl.float32)
        first, second = (a * c - b * s).to(first.dtype), (b * c + a * s).to(first.dtype)
        if head < num_heads:
            target = q + (token * num_heads + head) * head_dim + dims
        else:
            target = k_cache + slot + (head - num_heads) * head_stride + dims
    tl.store(target, first, mask=mask)
    tl.store(target + half, second, mask=mask)


def rotate_and_write(
    qkv: Tensor, rotary: tuple[Tensor, Tensor], caches: tuple[Tensor, Tensor], slots: Tensor
) -> Tensor:
    """Rotates queries and keys, writes keys and values to their slots; returns the queries [T, Q, D].

    qkv: [T, (Q + 2 KV) D].  rotary: cos and sin, each [T, 1, D], both halves alike.  caches: of one layer, each
    [blocks, S, KV, D].  slots: [T] int64.
    """
    k_cache, v_cache = caches
    _, _, num_kv_heads, head_dim = k_cache.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    assert k_cache.stride() == v_cache.stride()
    qkv, cos, sin = qkv.contiguous(), rotary[0].contiguous(), rotary[1].contiguous()
    q = qkv.new_empty(qkv.shape[0], num_heads, head_dim)
    _rotate_and_write[qkv.shape[0], num_heads + 2 * num_kv_heads](
        q, k_cache, v_cache, qkv, cos, sin, slots, num_heads, num_kv_heads, head_dim, k_cache.stride(1),
        k_cache.stride(2), HALF=triton.next_power_of_2(head_dim // 2), num_warps=1,
    )  # fmt: skip
    return q


@triton.jit
def _route(topk_ids, topk_weights, logits, num_experts, K: tl.constexpr, N: tl.constexpr, NORM: tl.constexpr):
    row, experts = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    score = tl.load(logits + row * num_experts + experts, mask=experts < num_experts, other=float("-inf"))
    score = score.to(tl.float32)
    weight = tl.exp(score - tl.max(score, axis=0))
    probs = tl.where(experts < num_experts, weight / tl.sum(weight, axis=0), -1.0)
    left, total = probs, 0.0
    for k in tl.static_range(K):
        best = tl.max(left, axis=0)
        # The first of equals; of numbers that are none (NaN) the last expert, so that the id is one.
        expert = tl.minimum(tl.min(tl.where(left == best, experts, N), axis=0), num_experts - 1)
        total += best
        tl.store(topk_ids + row * K + k, expert.to(tl.int64))
        tl.store(topk_weights + row * K + k, tl.sum(tl.where(experts == expert, probs, 0.0), axis=0))
        left = tl.where(experts == expert, -1.0, left)
    if NORM:
        for k in tl.static_range(K):
            place = topk_weights + row * K + k
            tl.store(place, tl.load(place) / total)


def route(router_logits: Tensor, topk: int, *, normalized: bool) -> tuple[Tensor, Tensor]:
    """The softmax in float32 over all experts, then the best: topk_ids [T, K] int64, topk_weights [T, K] float32.

    router_logits: [T, E].  normalized: the weights sum to 1.
    """
    router_logits = router_logits.contiguous()
    num_tokens, num_experts = router_logits.shape
    ids = torch.empty(num_tokens, topk, dtype=torch.int64, device=router_logits.device)
    weights = torch.empty(num_tokens, topk, dtype=torch.float32, device=router_logits.device)
    _route[num_tokens,](
        ids, weights, router_logits, num_experts, K=topk, N=triton.next_power_of_2(num_experts), NORM=normalized,
        num_warps=1,
    )  # fmt: skip
    return ids, weights


@triton.jit
def _localize(local, counts, topk_ids, local_ids, num_pairs, N: tl.constexpr):
    pairs = tl.program_id(0) * N + tl.arange(0, N)
    ids = tl.load(topk_ids + pairs, mask=pairs < num_pairs, other=-1)
    tl.store(local + pairs, tl.load(local_ids + ids, mask=ids >= 0, other=-1), mask=pairs < num_pairs)
    tl.atomic_add(counts + ids, 1, mask=ids >= 0)


def localize(topk_ids: Tensor, local_ids: Tensor, counts: Tensor) -> Tensor:
    """Each pair's expert by its place here: [T, K] int64, below zero for one elsewhere. Adds the pairs to `counts`.

    topk_ids: [T, K] int64.  local_ids: [E] int64.  counts: [E] int64.
    """
    topk_ids = topk_ids.contiguous()
    local = torch.empty_like(topk_ids)
    num_pairs = topk_ids.numel()
    _localize[triton.cdiv(num_pairs, 256),](local, counts, topk_ids, local_ids, num_pairs, N=256)
    return local
