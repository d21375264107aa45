"""The gate's choice of experts, in float32.

T: tokens, H: hidden size, E: routed experts, K: experts a token.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.kernels import gpu, native_products
from cluster.kernels.weights import native_for

FEW_ROWS = 64  # as many rows as the native kernels multiply with any weight


def route(
    x: Tensor, gate: Tensor, num_chosen: int, *, normalize: bool, change: Callable[[Tensor], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Each token's experts by probability, and their weights. x: [T, H], gate: [E, H].

    normalize: the weights of a token add up to 1.  change: adds to the logits [T, E] in place, before the choice.
    Returns topk_ids [T, K] int64 and topk_weights [T, K] float32.
    """
    native = native_for(x.dtype, x.device)
    if native is not None and x.shape[0] < FEW_ROWS:
        router_logits = native_products.linear(native, x, gate, None)  # [T, E]
    else:
        router_logits = F.linear(x, gate)
    if change is not None:
        change(router_logits)
    if gpu.runs_on(x):
        from cluster.kernels.gpu import fused

        return fused.route(router_logits, num_chosen, normalized=normalize)
    if native is None:
        return choose(router_logits, num_chosen, normalize=normalize)
    return native_products.choose(native, router_logits, num_chosen, normalize=normalize)


def choose(router_logits: Tensor, num_chosen: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """The plain definition: the probabilities of all experts, then the largest. router_logits: [T, E]."""
    router_probs = router_logits.softmax(dim=-1, dtype=torch.float32)
    topk_weights, topk_ids = router_probs.topk(num_chosen, dim=-1)
    if normalize:
        topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
    return topk_ids, topk_weights
