"""The tokens of a whole batch in torch operations, for CUDA and for a CPU without native kernels.

The host knows which rows ask for what, so nothing is read from the device but the result, once.
B: rows, V: vocabulary, G: rows of a group, which ask for the same, K: candidates of a row, best first.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cluster.kernels.sampling.random_numbers import uniforms
from cluster.kernels.sampling.reference import LARGEST
from cluster.kernels.sampling.rule import NONE_LEFT, NOT_FINITE, Chosen, Rule

# Logits at a time: a sort and sums in float64 take some 50 bytes for each. On the CPU they stay in its caches.
_AT_ONCE = {"cuda": 1 << 23, "cpu": 1 << 18}
_PENALTIES = ("repetition", "presence", "frequency")
_REALS = ("temperature", "top_p", "max_distance", *_PENALTIES)


@torch.inference_mode()
def choose_in_batch(logits: Tensor, rules: Sequence[Rule]) -> Chosen:
    """logits: [B, V] of any float dtype, unchanged; a rule for each row."""
    (num_rows, vocab_size), device = logits.shape, logits.device
    best = argmax(logits)  # [B]; a NaN counts as the largest
    finite = logits.gather(1, best.unsqueeze(1)).squeeze(1).isfinite()
    tokens = best
    at_once = _AT_ONCE["cpu" if device.type == "cpu" else "cuda"] // vocab_size
    for part in _parts([i for i, rule in enumerate(rules) if not rule.takes_largest], at_once):
        [rows] = _shipped({"rows": part}, np.int64, device).values()
        some = [rules[i] for i in part]
        chosen = _choose(logits.index_select(0, rows).float(), some, _forbidden(some, vocab_size, device))
        tokens = tokens.index_copy(0, rows, chosen)
    num_top = max(0, min(max(rule.num_top for rule in rules), vocab_size))
    logprobs = logits.new_zeros(num_rows, 1 + 2 * num_top, dtype=torch.float64)
    for part in _parts([i for i, rule in enumerate(rules) if rule.num_top >= 0], at_once):
        [rows] = _shipped({"rows": part}, np.int64, device).values()
        forbidden = _forbidden([rules[i] for i in part], vocab_size, device)
        group = _without(logits.index_select(0, rows).float(), forbidden)
        found = _logprobs(group, tokens.index_select(0, rows), num_top)
        logprobs = logprobs.index_copy(0, rows, found)
    tokens = tokens.where(finite, NOT_FINITE)
    host = torch.cat([tokens.double().unsqueeze(1), logprobs], dim=1).cpu()  # the one copy from the device
    ids, values = host[:, 2 : 2 + num_top], host[:, 2 + num_top :]
    return Chosen(host[:, 0].long().tolist(), host[:, 1].tolist(), ids.long().tolist(), values.tolist())


def argmax(logits: Tensor) -> Tensor:
    """[B, V] -> [B] int64. In 16 bits on the CPU by parts: torch's own takes 8 ms there where `amax` takes 0.5."""
    num_rows, vocab_size = logits.shape
    width = math.gcd(vocab_size, 128)
    if logits.device.type != "cpu" or logits.dtype == torch.float32 or width == 1:
        return logits.argmax(dim=-1)
    parts = logits.reshape(num_rows, -1, width)
    part = parts.amax(dim=-1).float().argmax(dim=-1)  # [B]
    inside: Tensor = parts[torch.arange(num_rows), part].float().argmax(dim=-1)
    return part * width + inside


def _choose(logits: Tensor, rules: Sequence[Rule], forbidden: Tensor | None = None) -> Tensor:
    """Tokens [G], NONE_LEFT where none is. logits: [G, V] float32, overwritten.  forbidden: [G, V], None for none."""
    vocab_size, device = logits.shape[1], logits.device
    kinds = [_kind(rule, vocab_size) for rule in rules]
    groups = {kind: [i for i, k in enumerate(kinds) if k is kind] for kind in dict.fromkeys(kinds)}
    wholes = _shipped(
        {
            "penalized": _places([rule.ids for rule in rules], vocab_size),
            "owners": np.repeat(np.arange(len(rules)), [len(rule.ids) for rule in rules]),
            "counts": _joined([rule.counts for rule in rules]),
            "banned": _places([rule.banned for rule in rules], vocab_size),
            "top_k": [rule.top_k for rule in rules],
            **{str(number): members for number, members in enumerate(groups.values())},
        },
        np.int64,
        device,
    )
    reals = _shipped(
        {
            "number": uniforms([rule.seed for rule in rules], [rule.position for rule in rules]),
            **{name: [getattr(rule, name) for rule in rules] for name in _REALS},
        },
        np.float64,
        device,
    )
    _penalize(logits.view(-1), wholes, reals)
    logits = _without(logits, forbidden)
    largest = logits.amax(dim=1, keepdim=True)
    tokens = torch.empty_like(wholes["top_k"])
    for number, (kind, members) in enumerate(groups.items()):
        rows = wholes[str(number)]
        group = logits if len(groups) == 1 else logits.index_select(0, rows)
        if kind is None:
            tokens.index_copy_(0, rows, group.argmax(dim=1))
            continue
        settings = {name: values.index_select(0, rows).unsqueeze(1) for name, values in reals.items()}
        distances = (largest.index_select(0, rows) - group) / settings["temperature"].float()
        most = max(rules[i].top_k for i in members)
        candidates, ids = kind(distances, wholes["top_k"].index_select(0, rows), most)
        places = _draw(candidates, settings, [rules[i] for i in members])
        tokens.index_copy_(0, rows, (places if ids is None else ids.gather(1, places)).squeeze(1))
    return tokens.where(largest.squeeze(1) > -torch.inf, NONE_LEFT)


def _penalize(logits: Tensor, wholes: Mapping[str, Tensor], reals: Mapping[str, Tensor]) -> None:
    """As the reference's `penalize`, then bans, in place. logits: [G * V] float32."""
    if len(wholes["penalized"]):
        places, counts = wholes["penalized"], wholes["counts"]
        repetition, presence, frequency = (
            reals[name].float().index_select(0, wholes["owners"]) for name in ("repetition", "presence", "frequency")
        )
        values = logits.index_select(0, places)
        values = torch.where(values > 0, values / repetition, values * repetition)
        values = values.nan_to_num(nan=-LARGEST, posinf=LARGEST, neginf=-LARGEST)
        logits.index_copy_(0, places, values - frequency * counts - presence * (counts > 0))
    if len(wholes["banned"]):
        logits.index_fill_(0, wholes["banned"], -torch.inf)


def _forbidden(rules: Sequence[Rule], vocab_size: int, device: torch.device) -> Tensor | None:
    """The tokens that the rows' masks leave out, [G, V]; None where no row has one."""
    if all(rule.allowed is None for rule in rules):
        return None
    width = next(len(rule.allowed) for rule in rules if rule.allowed is not None)
    every = np.full(width, -1, dtype=np.int32)
    words = torch.from_numpy(np.stack([every if rule.allowed is None else rule.allowed for rule in rules]))
    if device.type == "cuda":  # packed, 19 KB a row
        words = words.pin_memory().to(device, non_blocking=True)
    is_allowed = words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=device) & 1  # [G, V / 32, 32]
    return (is_allowed == 0).flatten(1)[:, :vocab_size]


def _without(logits: Tensor, forbidden: Tensor | None) -> Tensor:
    return logits if forbidden is None else logits.masked_fill_(forbidden, -torch.inf)


Candidates = tuple[
    Tensor, Tensor | None
]  # distances from the best token [G, K] float32, and ids [G, K]; None: in order


def _kind(rule: Rule, vocab_size: int) -> Callable[[Tensor, Tensor, int], Candidates] | None:
    """How candidates are found: from distances [G, V], each row's top_k [G] and the largest. None for greedy rows."""
    if not rule.temperature:
        return None
    if 0 < rule.top_k < vocab_size:
        return _best
    return _sorted if rule.top_p < 1.0 else _all


def _best(distances: Tensor, top_k: Tensor, num_candidates: int) -> Candidates:
    find = _nearest_on_cpu if distances.device.type == "cpu" else _nearest
    nearest, ids = find(distances, num_candidates)
    beyond = torch.arange(num_candidates, device=distances.device) >= top_k.unsqueeze(1)
    return nearest.masked_fill(beyond, torch.inf), ids


def _nearest(distances: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The least distances and their ids, [G, num] each; of equal ones the lowest ids, which `topk` leaves open."""
    # The bits of numbers that are not negative are in their order (-0 is). With the id behind them no two are equal.
    keys = distances.abs().view(torch.int32).long() << 32 | torch.arange(distances.shape[1], device=distances.device)
    keys = keys.topk(num, largest=False).values
    return (keys >> 32).int().view(torch.float32), keys & 0xFFFFFFFF


def _nearest_on_cpu(distances: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """As `_nearest`, row by row: a CPU takes six times as long for keys of 64 bits."""
    bounds = distances.topk(num, largest=False).values[:, -1]
    found = []
    for row, bound in zip(distances, bounds, strict=True):
        ids = torch.from_numpy(np.flatnonzero(~(row.numpy() > bound.item())))  # torch's own takes six times as long
        nearest, order = row[ids].sort(stable=True)
        found.append((nearest[:num], ids[order[:num]]))
    nearest, ids = (torch.stack(parts) for parts in zip(*found, strict=True))
    return nearest, ids


def _sorted(distances: Tensor, _: Tensor, __: int) -> Candidates:
    return distances.sort(dim=1, stable=True)


def _all(distances: Tensor, _: Tensor, __: int) -> Candidates:
    return distances, None


def _draw(distances: Tensor, reals: Mapping[str, Tensor], rules: Sequence[Rule]) -> Tensor:
    """The drawn candidates' places [G, 1]. distances: [G, K] float32; reals: [G, 1] float64 each."""
    probs = (-distances.double()).softmax(dim=1)
    cumulative = probs.cumsum(dim=1)
    if any(rule.top_p < 1.0 for rule in rules):
        # The first that reaches top_p stays. A row without top_p keeps those after which rounding leaves nothing.
        probs = probs.where((cumulative - probs < reals["top_p"]) | (reals["top_p"] >= 1.0), 0.0)
        cumulative = probs.cumsum(dim=1)
    if any(rule.max_distance < math.inf for rule in rules):
        probs = probs.where(distances.double() <= reals["max_distance"], 0.0)
        cumulative = probs.cumsum(dim=1)
    places = torch.searchsorted(cumulative, reals["number"] * cumulative.narrow(1, -1, 1), right=True)
    return places.clamp_max(distances.shape[1] - 1)


def _logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> Tensor:
    """[G, 1 + 2n] float64: the tokens' log-probabilities, n ids and theirs. logits: [G, V] float32; tokens: [G]."""
    largest = logits.amax(dim=1, keepdim=True)
    distances = largest - logits
    sums = (-distances).exp().sum(dim=1, keepdim=True, dtype=torch.float64).log()
    mine = -distances.gather(1, tokens.clamp_min(0).unsqueeze(1)) - sums
    if not num_top:
        return mine
    top, ids = _best(distances, torch.full_like(tokens, num_top), num_top)
    assert ids is not None
    return torch.cat([mine, ids.double(), -top - sums], dim=1)


def _parts(rows: Sequence[int], at_once: int) -> Iterator[Sequence[int]]:
    width = max(1, at_once)
    for first in range(0, len(rows), width):
        yield rows[first : first + width]


def _places(ids: Sequence[NDArray[np.int32]], vocab_size: int) -> NDArray[np.int64]:
    """Where each row's ids are in [G * V]."""
    return _joined([row_ids + np.int64(row * vocab_size) for row, row_ids in enumerate(ids)])


def _joined(arrays: Iterable[NDArray[np.int32] | NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, dtype=np.int64), *arrays])


def _shipped(arrays: Mapping[str, ArrayLike], dtype: type, device: torch.device) -> dict[str, Tensor]:
    """The arrays on the device, in one transfer for which the host does not wait."""
    flat: list[NDArray[np.generic]] = [np.asarray(array, dtype=dtype) for array in arrays.values()]
    whole = torch.from_numpy(np.concatenate(flat))
    if device.type == "cuda":
        whole = whole.pin_memory().to(device, non_blocking=True)
    return dict(zip(arrays, torch.split(whole, [len(array) for array in flat]), strict=True))
