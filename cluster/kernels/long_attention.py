"""Attention of one sequence with a long context over a paged cache, a piece of its keys at a time.

Nothing here grows with the context but the block table: a piece of keys and values is copied, multiplied and forgotten,
and a mask is made for the pieces alone that not all queries see whole.

t: queries at a time, P: keys at a time, S: tokens a block, Q: query heads, KV: key/value heads, D: head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.kernels.cache_rows import gather_rows

MAX_QUERIES = 2048  # at a time
MAX_KEYS = 4096  # at a time

Part = tuple[Tensor, Tensor]  # [1, Q, t, D], and the logarithm of its weight [1, Q, t] float32, -inf where none is seen


@dataclass(frozen=True, slots=True, kw_only=True)
class LongSequence:
    """One sequence's part of a plan of `GroupedAttention`.

    query_rows: [new tokens] into the T rows.  context: tokens in the cache, the new ones last.
    table: [blocks] int64.  max_keys, max_queries: at a time.
    """

    query_rows: Tensor
    context: int
    table: Tensor
    block_size: int
    max_keys: int = MAX_KEYS
    max_queries: int = MAX_QUERIES

    batch = 1  # sequences
    real = None  # all rows are

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, *, scale: float, window: int | None) -> Tensor:
        """q: [new tokens, Q, D]. Returns the same shape."""
        out = torch.empty_like(q)
        oldest = self.context - len(q)
        for row in range(0, len(q), self.max_queries):
            rows = q[row : row + self.max_queries]
            tile = _Queries(rows.transpose(0, 1).unsqueeze(0), oldest + row, scale, window)
            sums, log_weight = torch.zeros(1), torch.zeros(1)
            for i, (first, stop) in enumerate(self._pieces(tile)):
                k, v = (self._gathered(cache, first, stop, q) for cache in (k_cache, v_cache))
                part, log_part = tile.attend(k, v, first)
                if i == 0:
                    sums, log_weight = part.float(), log_part
                    continue
                both = torch.logaddexp(log_weight, log_part)
                sums = sums * (log_weight - both).exp().unsqueeze(-1) + part * (log_part - both).exp().unsqueeze(-1)
                log_weight = both
            sums = sums.masked_fill((log_weight == -torch.inf).unsqueeze(-1), torch.nan)  # as a softmax of nothing
            out[row : row + self.max_queries] = sums.squeeze(0).transpose(0, 1)
        return out

    def _pieces(self, tile: "_Queries") -> Iterator[tuple[int, int]]:
        """Ranges of keys: first the queries' own, of which each sees one at least, then the older ones."""
        yield tile.first, tile.first + tile.num
        oldest = 0 if tile.window is None else max(0, tile.first + 1 - tile.window)
        for first in range(oldest, tile.first, self.max_keys):
            yield first, min(first + self.max_keys, tile.first)

    def _gathered(self, cache: Tensor, first: int, stop: int, q: Tensor) -> Tensor:
        """[1, KV, P, D] in q's dtype."""
        tokens = torch.arange(first, stop, device=self.table.device)
        slots = self.table[tokens // self.block_size] * self.block_size + tokens % self.block_size
        num_kv_heads = cache.shape[2]
        heads = torch.arange(num_kv_heads, device=slots.device).unsqueeze(1)
        rows = (slots * num_kv_heads + heads).flatten()  # a head's rows one after another: no transposed copy
        return gather_rows(cache, rows, q.dtype).view(1, num_kv_heads, -1, q.shape[-1])


@dataclass(frozen=True, slots=True)
class _Queries:
    """q: [1, Q, t, D].  first: the position of the first of them."""

    q: Tensor
    first: int
    scale: float
    window: int | None

    @property
    def num(self) -> int:
        return self.q.shape[2]

    def attend(self, k: Tensor, v: Tensor, first_key: int) -> Part:
        """Over keys from first_key on: [1, KV, P, D] each."""
        num_keys, stop = k.shape[2], self.first + self.num
        is_own = first_key == self.first and num_keys == self.num
        sees_all = first_key + num_keys <= self.first + 1
        if self.window is not None and first_key <= stop - 1 - self.window:
            is_own = sees_all = False  # the last query does not see the first key
        if self.q.device.type != "cpu":
            return self._written_out(k, v, first_key)
        if is_own or sees_all:
            out, log_weight = _flash(self.q, k, v, 0.0, is_causal=is_own, scale=self.scale)
        else:
            visible = self._visible(first_key, num_keys, 0, self.num)
            mask = torch.zeros(visible.shape, dtype=self.q.dtype).masked_fill_(~visible, -torch.inf)
            out, log_weight = _flash(self.q, k, v, 0.0, attn_mask=mask.expand(1, 1, -1, -1), scale=self.scale)
            log_weight = log_weight.masked_fill(~visible.any(dim=-1), -torch.inf)
        if (log_weight < torch.inf).all() and are_finite(self.q, k, out):
            return out, log_weight
        return self._written_out(k, v, first_key)

    def _visible(self, first_key: int, num_keys: int, row: int, stop_row: int) -> Tensor:
        """[rows, P] bool, true where a query sees a key."""
        device = self.q.device
        keys = torch.arange(first_key, first_key + num_keys, device=device)
        positions = torch.arange(self.first + row, self.first + stop_row, device=device).unsqueeze(1)
        visible = keys <= positions
        return visible if self.window is None else visible & (keys > positions - self.window)

    def _written_out(self, k: Tensor, v: Tensor, first_key: int) -> Part:
        """As `attend`, so that a number that is not finite reaches the queries alone that see it."""
        groups = self.q.shape[1] // k.shape[1]
        keys, values = (x.float().repeat_interleave(groups, dim=1) for x in (k, v))  # [1, Q, P, D]
        wild = ~values.isfinite()
        tame, is_wild = values.masked_fill(wild, 0), wild.float()
        parts, logs = [], []
        size = max(1, (1 << 22) // (self.q.shape[1] * k.shape[2]))  # queries at a time: [1, Q, size, P] float32
        for row in range(0, self.num, size):
            queries = self.q[:, :, row : row + size].float()
            seen = self._visible(first_key, k.shape[2], row, row + queries.shape[2])
            scores = (torch.matmul(queries, keys.transpose(-1, -2)) * self.scale).masked_fill(~seen, -torch.inf)
            log_weight = scores.logsumexp(dim=-1)
            probs = scores.softmax(dim=-1).masked_fill((log_weight == -torch.inf).unsqueeze(-1), 0)
            part = torch.matmul(probs, tame).masked_fill(torch.matmul(seen.float(), is_wild) > 0, torch.nan)
            parts.append(part)
            logs.append(log_weight)
        return torch.cat(parts, dim=2).to(self.q.dtype), torch.cat(logs, dim=2)


def are_finite(*tensors: Tensor) -> bool:
    """Whether all numbers are; false, too, where a sum in float32 overflows.

    torch's fused attention for CPUs needs its inputs looked at: what one query sees may reach another that does not,
    and for some queries whose scores are NaN or infinite it gives zeros.
    """
    return bool(torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors]).isfinite().all())


def _flash(*args: object, **options: object) -> Part:
    """torch's fused attention for CPUs, with the logarithms that its public name leaves out."""
    out, log_weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **options)
    return out, log_weight
