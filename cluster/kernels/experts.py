"""Products of a batch with its routed experts. Knows neither layers nor which shard it runs on.

T: tokens, H: hidden size, I: expert intermediate size, K: experts a token, L: experts held here, N: (token, expert)
pairs that are computed here. An id below zero marks a pair that is computed elsewhere.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.kernels.linear import MIN_ROWS, PackedWeight, Weight, linear


def experts_reference(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """Weighted sum of each token's experts, one pair at a time: the plain definition that the fast paths must match.

    hidden_states: [T, H].  topk_ids: [T, K] int64, indices into the L experts or negative.  topk_weights: [T, K]
    float32.  gate_up_proj: [L, 2I, H], gate above up.  down_proj: [L, H, I].  Returns [T, H] float32.
    """
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for token, ids in enumerate(topk_ids.tolist()):
        for slot, expert in enumerate(ids):
            if expert >= 0:
                gate, up = F.linear(hidden_states[token], gate_up_proj[expert]).chunk(2)
                out[token] += topk_weights[token, slot] * F.linear(F.silu(gate) * up, down_proj[expert]).float()
    return out


def experts_by_loop(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Sequence[Weight] | Tensor,
    down_proj: Sequence[Weight] | Tensor,
) -> Tensor:
    """The CPU's path: one pair of products for each active expert, whose weights are read once. As the reference.

    gate_up_proj, down_proj: as the reference, or L weights of the same shapes, packed or not.
    Sums run in the order of the expert ids, so the result does not depend on how the batch is ordered.
    """
    pair_tokens, pair_weights, counts = _group(topk_ids, topk_weights, len(gate_up_proj))
    num_pairs = int(counts.sum())
    pair_tokens = pair_tokens[:num_pairs]
    # MIN_ROWS rows are computed where fewer are wanted (see `linear`): the next expert's stand in, and at the end any.
    spare = MIN_ROWS - 1 if isinstance(gate_up_proj[0], PackedWeight) else 0
    x = hidden_states.index_select(0, F.pad(pair_tokens, (0, spare)))  # [N + spare, H]
    y = torch.empty_like(x)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if not count:
            continue
        rows = x[start : start + max(count, 1 + spare)]
        gate, up = linear(rows, gate_up_proj[expert]).chunk(2, dim=-1)  # [rows, I]
        y[start : start + count] = linear(F.silu(gate).mul_(up), down_proj[expert])[:count]
        start += count
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    return out.index_add_(0, pair_tokens, y[:num_pairs] * pair_weights[:num_pairs])  # the product is float32


def experts_by_grouped_mm(
    hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """The GPU's path: two grouped products for all experts, no look at device values from the host. As the reference.

    Pairs that are computed elsewhere are grouped behind the last expert and multiplied by no weights.
    """
    num_local = gate_up_proj.shape[0]
    pair_tokens, pair_weights, counts = _group(topk_ids, topk_weights, num_local)
    offsets = counts.cumsum(0).to(torch.int32)  # [L]
    x = hidden_states[pair_tokens]  # [T*K, H]
    gate, up = F.grouped_mm(x, gate_up_proj.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down_proj.transpose(1, 2), offs=offsets)  # [T*K, H]
    here = (torch.arange(y.shape[0], device=y.device) < offsets[-1]).unsqueeze(1)  # rows past it were never written
    y = torch.where(here, y.float() * pair_weights, 0.0)
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    return out.index_add_(0, pair_tokens, y)


def _group(topk_ids: Tensor, topk_weights: Tensor, num_local: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the pairs by expert, those of other shards last, tokens in order within an expert.

    Returns each pair's token [T*K] int64, its weight [T*K, 1] float32, and the pairs of each expert [L] int64.
    """
    num_slots = topk_ids.shape[1]
    flat_ids = topk_ids.flatten()
    flat_ids = torch.where(flat_ids < 0, num_local, flat_ids)
    sorted_ids, order = flat_ids.sort(stable=True)
    bounds = torch.searchsorted(sorted_ids, torch.arange(num_local + 1, device=flat_ids.device))
    return order // num_slots, topk_weights.flatten()[order].unsqueeze(1), bounds.diff()
