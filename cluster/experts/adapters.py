"""The part of LoRA adapters that changes a shard's routed experts: loads it, and computes the rows that need it.

T: rows, H: hidden size, I: expert intermediate size, K: experts a row, M: rows of one expert.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.checkpoint.adapters import StoredAdapter, open_adapter
from cluster.checkpoint.names import expert_shapes
from cluster.config import ModelConfig
from cluster.config.lora import MAX_RANK, AdapterList, AdapterSource
from cluster.errors import ShardUnavailable
from cluster.experts.adapted_ids import NO_ADAPTER
from cluster.kernels.experts import ExpertWeights
from cluster.kernels.lora import LowRank
from cluster.kernels.weights import weight_maker

Slice = Mapping[int, Sequence[int]]  # layer id -> expert ids


@dataclass(frozen=True, slots=True)
class _Change:
    """Of one expert. None where that side is the base's."""

    gate_up: LowRank | None
    down: LowRank | None


@dataclass(frozen=True, slots=True)
class _Held:
    """An adapter as far as its experts are here. experts: layer and number of all that it changes."""

    source: AdapterSource
    stored: StoredAdapter
    experts: frozenset[tuple[int, int]]
    changes: Mapping[tuple[int, int], _Change] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AdaptedSlots:
    """Slots that adapters change, all [n]: their rows, experts, adapters' numbers, places in the layer's weights; and
    float32 weights of the sums."""

    rows: np.ndarray
    experts: np.ndarray
    numbers: np.ndarray
    places: np.ndarray
    weights: Tensor


class HeldAdapters:
    """The adapters that a shard has at a moment, by number."""

    def __init__(self, held: Mapping[int, _Held]) -> None:
        self.held = held

    def __bool__(self) -> bool:
        return bool(self.held)

    @property
    def num_bytes(self) -> int:
        every = [change for held in self.held.values() for change in held.changes.values()]
        return sum(side.nbytes for one in every for side in (one.gate_up, one.down) if side is not None)

    def check(self, topk_experts: np.ndarray, numbers: np.ndarray, layer_id: int, shard_id: int) -> np.ndarray:
        """The slots that an adapter changes: [T, K] bool. numbers: [T, K]. Raises ShardUnavailable for an adapter that
        is not here."""
        found = np.zeros(numbers.shape, dtype=bool)
        for row, slot in zip(*np.nonzero((numbers != NO_ADAPTER) & (topk_experts >= 0)), strict=True):
            held, key = self.held.get(int(numbers[row, slot])), (layer_id, int(topk_experts[row, slot]))
            if held is None or (key in held.experts and key not in held.changes):
                raise ShardUnavailable(f"shard {shard_id} does not hold adapter {numbers[row, slot]} yet", shard_id)
            found[row, slot] = key in held.experts
        return found

    def compute(
        self, layer_id: int, weights: ExpertWeights, slots: AdaptedSlots, hidden_states: Tensor, out: Tensor
    ) -> None:
        """Adds the weighted sums of the slots that adapters change to `out` [T, H] float32.

        Each expert's weights are read once for all adapters.  hidden_states: [T, H].
        """
        for expert in np.unique(slots.experts):
            chosen = np.flatnonzero(slots.experts == expert)
            chosen = chosen[np.argsort(slots.numbers[chosen], kind="stable")]
            rows = torch.from_numpy(slots.rows[chosen]).to(out.device)
            x, place = hidden_states.index_select(0, rows), int(slots.places[chosen[0]])
            parts = self._parts(layer_id, int(expert), slots.numbers[chosen])
            gate_up = weights.gate_up[place].product(x)  # [M, 2I]
            for part, change in parts:
                if change.gate_up is not None:
                    gate_up[part] += change.gate_up.product(x[part])
            gate, up = gate_up.chunk(2, dim=-1)
            inner = F.silu(gate) * up  # [M, I]
            y = weights.down[place].product(inner)
            for part, change in parts:
                if change.down is not None:
                    y[part] += change.down.product(inner[part])
            pair_weights = slots.weights[torch.from_numpy(chosen).to(slots.weights.device)].to(out.device)
            out.index_add_(0, rows, y.float() * pair_weights.unsqueeze(1))

    def _parts(self, layer_id: int, expert: int, numbers: np.ndarray) -> list[tuple[slice, _Change]]:
        """The rows of each adapter, which stand side by side, and its change. numbers: [M], ascending."""
        starts = np.flatnonzero(np.diff(numbers, prepend=NO_ADAPTER))
        stops = [*starts[1:], len(numbers)]
        return [
            (slice(int(start), int(stop)), self.held[int(numbers[start])].changes[layer_id, expert])
            for start, stop in zip(starts, stops, strict=True)
        ]


class ExpertAdapters:
    """One thread may read `now`, one call the rest."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._make = weight_maker(dtype, device)
        self.now = HeldAdapters({})
        self._version = -1.0

    def follow(self, wanted: AdapterList, experts: Slice) -> None:
        """Loads those that are not here, and lets the others go. Blocks. Raises CheckpointError; then nothing has
        changed. A list that is older than the last one changes nothing.

        experts: those of this shard.
        """
        if wanted.version < self._version:
            return
        held: dict[int, _Held] = {}
        for source in wanted.adapters:
            known = self.now.held.get(source.number)
            if known is None or known.source != source:
                stored = open_adapter(source.directory, self._config, MAX_RANK)  # the controller has looked at its rank
                known = self._with(_Held(source, stored, stored.experts), experts)
            held[source.number] = known
        self.now, self._version = HeldAdapters(held), wanted.version

    def hold(self, experts: Slice) -> None:
        """The shard has these experts from now on. Blocks. Raises CheckpointError."""
        self.now = HeldAdapters({number: self._with(held, experts) for number, held in self.now.held.items()})

    def _with(self, held: _Held, experts: Slice) -> _Held:
        """With the changes of these experts alone; those that are here are not read again."""
        wanted = {(layer_id, expert_id) for layer_id, ids in experts.items() for expert_id in ids} & held.experts
        changes = {key: held.changes.get(key) or self._read(held.stored, *key) for key in sorted(wanted)}
        return _Held(held.source, held.stored, held.experts, changes)

    def _read(self, stored: StoredAdapter, layer_id: int, expert_id: int) -> _Change:
        gate, up, down = (
            (name.removesuffix(".weight"), shape[0])
            for name, shape in expert_shapes(self._config, layer_id, expert_id).items()
        )
        found = stored.read([name for name, _ in (gate, up, down) if name in stored.modules])
        sides = []
        for outputs in (dict((gate, up)), dict((down,))):
            changes = {name: found[name] for name in outputs if name in found}
            sides.append(LowRank(changes, outputs, self._make) if changes else None)
        return _Change(*sides)
