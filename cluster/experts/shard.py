"""One shard's experts: loads its slice, multiplies rows with it. Stateless between calls; knows no network, no plan.

T: rows, H: hidden size, I: expert intermediate size, K: experts a token, E: routed experts of a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.checkpoint.names import expert_shapes
from cluster.checkpoint.opening import Checkpoint
from cluster.config import ModelConfig
from cluster.config.lora import AdapterList
from cluster.config.quantization import Quantization
from cluster.errors import ShardUnavailable
from cluster.experts.adapted_ids import experts_of, numbers_of
from cluster.experts.adapters import AdaptedSlots, ExpertAdapters
from cluster.kernels import gpu
from cluster.kernels.experts import ExpertWeights, no_experts
from cluster.kernels.weights import Parts, Weight, WeightLoader

NO_PLACE = -1  # of an expert that is elsewhere


@dataclass(frozen=True, slots=True)
class LayerSlice:
    """One layer's physical experts. local_ids: [E] int64 on the shard's device: each expert's place in `weights`, -1
    for one that is elsewhere. places: the same on the CPU, [E + 1]; an id of -1 finds the last of them, -1."""

    expert_ids: tuple[int, ...]
    local_ids: Tensor
    places: np.ndarray
    weights: ExpertWeights


class ExpertShard:
    """Experts of any layers in any number, uneven slices included. One thread may call `forward`, one `load`."""

    def __init__(
        self, shard_id: int, config: ModelConfig, *, dtype: torch.dtype, device: torch.device,
        quantization: Quantization | None = None,
    ) -> None:  # fmt: skip
        assert config.moe is not None, "a dense model has no experts to hold"
        self.shard_id = shard_id
        self.config = config
        self.dtype = dtype
        self.device = device
        self.layers: dict[int, LayerSlice] = {}
        self._no_experts = no_experts(
            config.hidden_size, config.moe.moe_intermediate_size, dtype=dtype, device=device, quantization=quantization
        )
        self.adapters = ExpertAdapters(config, dtype=dtype, device=device)
        self.expert_tokens = torch.zeros(
            (config.num_hidden_layers, config.num_experts), dtype=torch.int64, device=device
        )  # rows that each expert has computed here since the start: the load that placement balances

    def missing_tensors(self, experts: Mapping[int, Sequence[int]]) -> list[str]:
        """Names of the tensors that `load` would read."""
        here = {layer_id: layer.expert_ids for layer_id, layer in self.layers.items()}
        return [
            name
            for layer_id, expert_ids in experts.items()
            for expert_id in expert_ids
            if expert_id not in here.get(layer_id, ())
            for name in expert_shapes(self.config, layer_id, expert_id)
        ]

    def load(
        self,
        reader: Checkpoint,
        experts: Mapping[int, Sequence[int]],
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Changes the slice to `experts` (layer id -> expert ids): reads those that are missing, then drops the others.

        Blocks until read; layers change one after another, `forward` goes on beside it. Opens only the tensors that
        are read. Peak memory is the slice, and where weights are packed one of them more, gate and up together; a GPU
        has a layer that changes twice meanwhile. Raises CheckpointError for a missing or misshapen tensor, a damaged
        file; the layers before it stay changed.
        """
        self.adapters.hold({layer_id: sorted({*self._ids(layer_id), *ids}) for layer_id, ids in experts.items()})
        loader = WeightLoader(lambda targets: reader.load(targets, progress))
        for layer_id, expert_ids in experts.items():
            before = self.layers.get(layer_id)
            if before is None or before.expert_ids != tuple(expert_ids):
                self.layers[layer_id] = self._changed(layer_id, tuple(expert_ids), before, loader)
        for layer_id in self.layers.keys() - experts.keys():
            del self.layers[layer_id]
        self.adapters.hold(experts)

    def adapt(self, wanted: AdapterList) -> None:
        """Holds the adapters' part of its experts from now on, as `ExpertAdapters.follow`. Not beside `load`."""
        self.adapters.follow(wanted, {layer_id: layer.expert_ids for layer_id, layer in self.layers.items()})

    def _ids(self, layer_id: int) -> tuple[int, ...]:
        layer = self.layers.get(layer_id)
        return () if layer is None else layer.expert_ids

    def _changed(
        self, layer_id: int, expert_ids: tuple[int, ...], before: LayerSlice | None, loader: WeightLoader
    ) -> LayerSlice:
        """A layer with other experts than before; those that it had are not read again."""
        known = before.expert_ids if before is not None else ()
        weights = (before.weights if before is not None else self._no_experts).rearranged(
            [known.index(expert_id) if expert_id in known else None for expert_id in expert_ids]
        )
        unread: list[tuple[Weight, Parts]] = []
        for local_id, expert_id in enumerate(expert_ids):
            if expert_id not in known:
                gate, up, down = (
                    {name.removesuffix(".weight"): shape[0]}
                    for name, shape in expert_shapes(self.config, layer_id, expert_id).items()
                )
                unread += [(weights.gate_up[local_id], gate | up), (weights.down[local_id], down)]
        loader.load(unread)
        local_ids = torch.full((self.config.num_experts,), -1, dtype=torch.int64)
        local_ids[list(expert_ids)] = torch.arange(len(expert_ids))
        return LayerSlice(expert_ids, local_ids.to(self.device), np.append(local_ids.numpy(), -1), weights)

    def forward(self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Sums this shard's weighted experts for each row, in float32.

        hidden_states: [T, H].  topk_ids: [T, K] int64 logical ids, negative for "not here".  topk_weights: [T, K]
        float32.  Both are on the CPU or the shard's device.  Returns [T, H] in the dtype of hidden_states.
        Raises ShardUnavailable for an expert that is not here.
        """
        layer = self.layers.get(layer_id)
        if layer is None:
            raise ShardUnavailable(f"shard {self.shard_id} holds no expert of layer {layer_id}", self.shard_id)
        counts = self.expert_tokens.select(0, layer_id)
        if self.adapters.now and (topk_ids.cpu() > self.config.num_experts).any():
            return self._adapted(layer_id, hidden_states, topk_ids.cpu(), topk_weights)
        if self.device.type == "cpu":
            local_ids = self._localize_on_cpu(layer_id, layer, topk_ids.numpy(), counts.numpy())
        else:
            if not topk_ids.is_cuda:  # from another process; a look at ids on a GPU would wait for it
                self._places(layer_id, layer, topk_ids.numpy())
            local_ids = self._localize(layer.local_ids, topk_ids.to(self.device, non_blocking=True), counts)
            topk_weights = topk_weights.to(self.device, non_blocking=True)
        with torch.inference_mode():
            out = layer.weights.forward(hidden_states, local_ids, topk_weights)
        return out.to(hidden_states.dtype)

    def _adapted(self, layer_id: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """As `forward`, of rows of which some have adapters. topk_ids: on the CPU, as `adapted_ids` has them."""
        layer, num_experts, adapters = self.layers[layer_id], self.config.num_experts, self.adapters.now
        experts, numbers = experts_of(topk_ids.numpy(), num_experts), numbers_of(topk_ids.numpy(), num_experts)
        places = self._places(layer_id, layer, experts)
        changed = adapters.check(experts, numbers, layer_id, self.shard_id)
        topk_weights = topk_weights.to(self.device)
        rows, slots = np.nonzero(changed)
        with torch.inference_mode():
            others = torch.from_numpy(np.where(changed, NO_PLACE, places)).to(self.device)
            out = layer.weights.forward(hidden_states, others, topk_weights)
            at = torch.from_numpy(rows).to(self.device), torch.from_numpy(slots).to(self.device)
            adapted = AdaptedSlots(rows, experts[changed], numbers[changed], places[changed], topk_weights[at])
            adapters.compute(layer_id, layer.weights, adapted, hidden_states, out)
        counted = np.bincount(experts[experts >= 0], minlength=num_experts)
        self.expert_tokens.select(0, layer_id).add_(torch.from_numpy(counted).to(self.device))
        return out.to(hidden_states.dtype)

    def _places(self, layer_id: int, layer: LayerSlice, topk_ids: np.ndarray) -> np.ndarray:
        """Each slot's place in the layer's weights, -1 for "not here": [T, K]. Raises ShardUnavailable."""
        try:
            places: np.ndarray = layer.places[np.maximum(topk_ids, NO_PLACE)]
        except IndexError:
            raise ShardUnavailable(
                f"shard {self.shard_id} does not hold the adapter of a row yet", self.shard_id
            ) from None
        missing = topk_ids[(places < 0) & (topk_ids >= 0)]
        if missing.size:
            raise ShardUnavailable(
                f"shard {self.shard_id} does not hold expert {missing.min()} of layer {layer_id}: "
                "the plan has moved on",
                self.shard_id,
            )
        return places

    def _localize_on_cpu(self, layer_id: int, layer: LayerSlice, topk_ids: np.ndarray, counts: np.ndarray) -> Tensor:
        """As `_localize`, in numpy, whose small operations take a third of torch's time. Raises ShardUnavailable."""
        places = self._places(layer_id, layer, topk_ids)
        counts += np.bincount(topk_ids[topk_ids >= 0], minlength=len(counts))
        return torch.from_numpy(places)

    def _localize(self, places: Tensor, topk_ids: Tensor, counts: Tensor) -> Tensor:
        """Each slot's place in a layer's weights: [T, K], negative for "not here". Adds the slots to `counts` [E]."""
        if gpu.runs_on(topk_ids):
            from cluster.kernels.gpu.fused import localize

            return localize(topk_ids, places, counts)
        here, ids = topk_ids >= 0, topk_ids.clamp_min(0)
        counts.index_add_(0, ids.flatten(), here.flatten().long())
        return torch.where(here, places.take(ids), -1)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights that it has."""
        layers = [layer.weights for layer in list(self.layers.values())]
        weights = sum(weight.nbytes for layer in layers for weight in (*layer.gate_up, *layer.down))
        return weights + self.adapters.now.num_bytes
