"""One shard's experts: loads its slice, multiplies rows with it. Stateless between calls; knows no network, no plan.

T: rows, H: hidden size, I: expert intermediate size, K: experts a token, E: routed experts of a layer, L: held here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.checkpoint.reader import CheckpointReader
from cluster.config import ModelConfig
from cluster.errors import ShardUnavailable
from cluster.kernels.experts import experts_by_grouped_mm, experts_by_loop
from cluster.kernels.linear import PackedWeight, Weight, packs


@dataclass(frozen=True, slots=True)
class LayerSlice:
    """One layer's physical experts. local_ids: [E] int64, where each expert stands here, -1 for elsewhere.
    held: [E] bool on the CPU, whether it is here."""

    expert_ids: tuple[int, ...]
    local_ids: Tensor
    held: Tensor
    gate_up_proj: Tensor | list[Weight]  # [L, 2I, H]
    down_proj: Tensor | list[Weight]  # [L, H, I]


class ExpertShard:
    """Experts of any layers in any number, uneven slices included. One thread may call `forward`, one `load`."""

    def __init__(self, shard_id: int, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        assert config.moe is not None, "a dense model has no experts to hold"
        self.shard_id = shard_id
        self.config = config
        self.width = config.moe.moe_intermediate_size
        self.dtype = dtype
        self.device = device
        self.layers: dict[int, LayerSlice] = {}
        self._plain: Tensor | None = None  # where weights are read before they are packed, during a load
        self.expert_tokens = torch.zeros(
            (config.num_hidden_layers, config.num_experts), dtype=torch.int64, device=device
        )  # rows that each expert has computed here since the start: the load that placement balances

    def load(
        self,
        reader: CheckpointReader,
        experts: Mapping[int, Sequence[int]],
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Holds `experts` (layer id -> expert ids) from now on: reads what is not here, then lets go of the rest.

        Blocks until read; layers change one after another, `forward` goes on beside it. Opens only the tensors that
        are read. Peak memory is the slice plus one tensor, or one product's weight where weights are packed, which is
        gate and up together; where a layer that is held changes and weights are not packed, that layer's slice is
        there twice. Raises CheckpointError for a missing or misshapen tensor, a damaged file; layers that were through
        before stay changed.
        """
        change = self._load_packed if packs(self.dtype, self.device) else self._load_plain
        for layer_id, expert_ids in experts.items():
            held = self.layers.get(layer_id)
            if held is None or held.expert_ids != tuple(expert_ids):
                self.layers[layer_id] = change(reader, layer_id, tuple(expert_ids), held, progress)
        self._plain = None
        for layer_id in self.layers.keys() - experts.keys():
            del self.layers[layer_id]

    def _load_plain(
        self,
        reader: CheckpointReader,
        layer_id: int,
        expert_ids: tuple[int, ...],
        held: LayerSlice | None,
        progress: Callable[[int], None] | None,
    ) -> LayerSlice:
        gate_up_proj, down_proj = self._allocate(len(expert_ids))
        targets: dict[str, Tensor] = {}
        for local_id, expert_id in enumerate(expert_ids):
            if held is not None and expert_id in held.expert_ids:
                before = held.expert_ids.index(expert_id)
                assert isinstance(held.gate_up_proj, Tensor)
                assert isinstance(held.down_proj, Tensor)
                gate_up_proj[local_id] = held.gate_up_proj[before]
                down_proj[local_id] = held.down_proj[before]
            else:
                targets |= _gate_up_targets(layer_id, expert_id, gate_up_proj[local_id])
                targets |= _down_targets(layer_id, expert_id, down_proj[local_id])
        reader.load(targets, progress)
        return self._layer(expert_ids, gate_up_proj, down_proj)

    def _load_packed(
        self,
        reader: CheckpointReader,
        layer_id: int,
        expert_ids: tuple[int, ...],
        held: LayerSlice | None,
        progress: Callable[[int], None] | None,
    ) -> LayerSlice:
        hidden, width = self.config.hidden_size, self.width
        if self._plain is None:
            # Every weight is read into the same memory: freed between two packed ones it would stay a hole in the heap.
            self._plain = torch.empty(2 * width * hidden, dtype=self.dtype, device=self.device)
        gate_up = self._plain.view(2 * width, hidden)
        down = self._plain[: hidden * width].view(hidden, width)
        packed: tuple[list[Weight], list[Weight]] = ([], [])
        for expert_id in expert_ids:
            if held is not None and expert_id in held.expert_ids:
                before = held.expert_ids.index(expert_id)
                packed[0].append(held.gate_up_proj[before])
                packed[1].append(held.down_proj[before])
                continue
            reader.load(_gate_up_targets(layer_id, expert_id, gate_up), progress)
            packed[0].append(PackedWeight(gate_up))
            reader.load(_down_targets(layer_id, expert_id, down), progress)
            packed[1].append(PackedWeight(down))
        return self._layer(expert_ids, *packed)

    def forward(self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Sums this shard's weighted experts for each row, in float32.

        hidden_states: [T, H].  topk_ids: [T, K] int64 logical ids, negative for "not here", on the CPU or
        the shard's device.  topk_weights: [T, K] float32.  Returns [T, H] in the dtype of hidden_states.
        Raises ShardUnavailable for an expert that is not here.
        """
        layer = self.layers.get(layer_id)
        if layer is None:
            raise ShardUnavailable(f"shard {self.shard_id} holds no expert of layer {layer_id}", self.shard_id)
        if not topk_ids.is_cuda:  # a look at ids on a GPU would wait for it; from another process they come on the CPU
            missing = (topk_ids >= 0) & ~layer.held[topk_ids.clamp_min(0)]
            if missing.any():
                raise ShardUnavailable(
                    f"shard {self.shard_id} does not hold expert {int(topk_ids[missing].min())} of layer {layer_id}: "
                    "the plan has moved on",
                    self.shard_id,
                )
        topk_ids = topk_ids.to(self.device, non_blocking=True)
        here = topk_ids >= 0
        local_ids = torch.where(here, layer.local_ids[topk_ids.clamp_min(0)], -1)  # [T, K]
        self.expert_tokens[layer_id].index_add_(0, topk_ids.clamp_min(0).flatten(), here.flatten().long())
        with torch.inference_mode():
            if hidden_states.is_cuda:
                assert isinstance(layer.gate_up_proj, Tensor)
                assert isinstance(layer.down_proj, Tensor)
                out = experts_by_grouped_mm(hidden_states, local_ids, topk_weights, layer.gate_up_proj, layer.down_proj)
            else:
                out = experts_by_loop(hidden_states, local_ids, topk_weights, layer.gate_up_proj, layer.down_proj)
        return out.to(hidden_states.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights held."""
        slices = (weights for layer in list(self.layers.values()) for weights in (layer.gate_up_proj, layer.down_proj))
        return sum(weight.nbytes for weights in slices for weight in weights)

    def _allocate(self, num_experts: int) -> tuple[Tensor, Tensor]:
        """[num_experts, 2I, H] and [num_experts, H, I], not filled."""
        hidden, width = self.config.hidden_size, self.width
        shapes = ((num_experts, 2 * width, hidden), (num_experts, hidden, width))
        gate_up_proj, down_proj = (torch.empty(shape, dtype=self.dtype, device=self.device) for shape in shapes)
        return gate_up_proj, down_proj

    def _layer(
        self, expert_ids: Sequence[int], gate_up_proj: Tensor | list[Weight], down_proj: Tensor | list[Weight]
    ) -> LayerSlice:
        local_ids = torch.full((self.config.num_experts,), -1, dtype=torch.int64)
        local_ids[list(expert_ids)] = torch.arange(len(expert_ids))
        return LayerSlice(tuple(expert_ids), local_ids.to(self.device), local_ids >= 0, gate_up_proj, down_proj)


def _gate_up_targets(layer_id: int, expert_id: int, gate_up_proj: Tensor) -> dict[str, Tensor]:
    """Where the checkpoint's tensors of one expert's first product go. gate_up_proj: [2I, H]."""
    gate, up = gate_up_proj.chunk(2)
    return {_name(layer_id, expert_id, "gate_proj"): gate, _name(layer_id, expert_id, "up_proj"): up}


def _down_targets(layer_id: int, expert_id: int, down_proj: Tensor) -> dict[str, Tensor]:
    """As `_gate_up_targets`, of the second. down_proj: [H, I]."""
    return {_name(layer_id, expert_id, "down_proj"): down_proj}


def _name(layer_id: int, expert_id: int, projection: str) -> str:
    return f"model.layers.{layer_id}.mlp.experts.{expert_id}.{projection}.weight"
