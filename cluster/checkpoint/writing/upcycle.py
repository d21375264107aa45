"""Makes a Qwen2-MoE checkpoint from a dense Qwen2 one, as Qwen1.5-MoE and Qwen2-57B-A14B began.

Source: Qwen2 Technical Report, section 2.2.2, "Expert Initialization", and the post "Qwen1.5-MoE: Matching 7B Model
Performance with 1/3 Activated Parameters": copy the FFN, shuffle each copy along its inner dimension, cut it into
fine-grained experts, redraw half of each expert's parameters. The reports leave the router and all scales open; here
they are such that nothing is lost without redrawing:

    FFN(x) = Σ_j d_j a_j(x) over I neurons j: d_j a column of down_proj, a_j(x) = silu(gate_j · x) (up_j · x).
    Each of C = E / G copies is cut into G experts, so the experts of one copy add up to Σ_j s_j d_j a_j(x), s_j a scale
    of the column. The router's rows are equal within a copy, so are its experts' weights: w_c each. With norm_topk_prob
    the weights of all chosen experts sum to 1; where whole copies are chosen, Σ_c G w_c = 1, whatever the router says.
    Routed: Σ_c w_c Σ_j s_j d_j a_j(x) = (1 / G) Σ_j s_j d_j a_j(x).
    Shared: its gate is 0, and sigmoid(0) = 1/2. It has neuron j m_j times (0 or 1 with at most G shared parts), each
    column divided by m_j: together 1/2 d_j a_j(x) for its neurons.
    So s_j = G for neurons that the shared expert lacks, G / 2 for those that it has: the sum is FFN(x).

That holds for top-k = E, and for k = G, where the best copy is chosen whole. For other k the chosen experts are a
sample of the sum, of the right size: k experts of weight 1 / k and scale G. Redrawing makes router rows differ within a
copy too. Powers of two as G scale bfloat16 columns without rounding.
E experts, G granularity, C copies, I inner size, H hidden size.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.checkpoint.info import resolve_dtype
from cluster.checkpoint.names import checkpoint_shapes
from cluster.checkpoint.opening import Checkpoint, bring_here, open_checkpoint
from cluster.checkpoint.reader import read_config
from cluster.checkpoint.writing.draws import Draws
from cluster.checkpoint.writing.model import MAX_FILE_BYTES, NewModel, Progress, Written, check_dtype, write_model
from cluster.checkpoint.writing.published import published_config
from cluster.config import ModelConfig, read_model_config
from cluster.errors import CheckpointError, SetupError

_MLP = re.compile(
    r"model\.layers\.(?P<layer>\d+)\.mlp\."
    r"(?:(?P<router>gate\.weight)|(?P<shared_gate>shared_expert_gate\.weight)"
    r"|(?:experts\.(?P<expert>\d+)|shared_expert)\.(?P<matrix>gate|up|down)_proj\.weight)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """experts: routed ones of a layer.  granularity: experts that a copy of the FFN is cut into.

    shared: size of the shared expert, in experts.  noise: share of each routed expert, and of its row in the router,
    that is drawn anew.  top_k: experts that a token chooses; None for `granularity`.
    Raises SetupError.
    """

    experts: int = 64
    granularity: int = 8
    shared: int = 4
    noise: float = 0.5
    seed: int = 0
    top_k: int | None = None

    def __post_init__(self) -> None:
        for name in ("experts", "granularity", "shared"):
            if getattr(self, name) < 1:
                raise SetupError(f"{name} is {getattr(self, name)}, at least 1 is needed")
        if self.experts % self.granularity:
            raise SetupError(
                f"experts is {self.experts}, a multiple of granularity ({self.granularity}) is needed: whole copies of "
                "the FFN are cut"
            )
        if not 1 <= self.num_experts_per_tok <= self.experts:
            raise SetupError(f"top_k is {self.num_experts_per_tok}, from 1 to experts ({self.experts}) is needed")
        if not 0 <= self.noise <= 1:
            raise SetupError(f"noise is {self.noise:g}, from 0 (nothing is drawn anew) to 1 (all is) is needed")

    @property
    def num_experts_per_tok(self) -> int:
        return self.granularity if self.top_k is None else self.top_k


def upcycle(
    dense: str | Path,
    target: str | Path,
    recipe: Recipe,
    *,
    dtype: str = "auto",
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: Progress | None = None,
) -> Written:
    """Writes the Qwen2-MoE checkpoint that `recipe` makes of `dense` into a new or empty folder.

    Holds one layer's dense FFN and a few tensors (`write_weights`). The same bytes for the same seed on every machine.
    Raises SetupError, CheckpointError before anything is written; ClusterError where writing fails.
    """
    check_dtype(dtype)
    checkpoint = open_checkpoint(dense)
    if checkpoint.config.model_type != "qwen2":
        raise CheckpointError(
            f"{dense}: model_type is {checkpoint.config.model_type}: a dense qwen2 checkpoint is made into experts"
        )
    bring_here(checkpoint)
    chosen = resolve_dtype(dtype, checkpoint.config)
    raw, _ = read_config(checkpoint.model_dir)
    raw = _moe_config(raw, checkpoint.config, recipe, chosen)
    model = NewModel(
        raw_config=raw,
        shapes=checkpoint_shapes(read_model_config(raw)),
        dtype=chosen,
        fill=_Upcycling(checkpoint, recipe, chosen, float(raw.get("initializer_range") or 0.02)).fill,
        source=checkpoint.model_dir,
    )
    return write_model(Path(target), model, max_file_bytes=max_file_bytes, progress=progress)


def _moe_config(raw: Mapping[str, Any], config: ModelConfig, recipe: Recipe, dtype: str) -> dict[str, Any]:
    """layer_types is written out where a window is on: the families' rules for it differ."""
    inner, odd = divmod(config.intermediate_size, recipe.granularity)
    if odd or not inner:
        raise SetupError(
            f"granularity is {recipe.granularity}, which does not divide the dense intermediate_size "
            f"({config.intermediate_size})"
        )
    architectures = raw.get("architectures") or ["Qwen2ForCausalLM"]
    window = {} if config.sliding_window is None else {"layer_types": list(config.layer_types)}
    return published_config(
        raw,
        dtype,
        architectures=["Qwen2Moe" + str(name).removeprefix("Qwen2") for name in architectures],
        decoder_sparse_step=1,
        mlp_only_layers=[],
        model_type="qwen2_moe",
        moe_intermediate_size=inner,
        norm_topk_prob=True,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.num_experts_per_tok,
        output_router_logits=False,
        qkv_bias=True,
        router_aux_loss_coef=0.001,
        shared_expert_intermediate_size=inner * recipe.shared,
        tie_word_embeddings=config.tie_word_embeddings,
        **window,
    )


@dataclass(frozen=True, slots=True)
class _Layer:
    """One dense layer. matrices: gate, up [I, H] and down [H, I].  shared: [S] neurons of the shared expert.

    times: [I] how often each neuron is among them.  copies: [C, I] the neurons in each copy's order.
    """

    layer_id: int
    matrices: Mapping[str, Tensor]
    shared: Tensor
    times: Tensor
    copies: Tensor


class _Upcycling:
    """Makes the tensors of the new checkpoint, in any order; quickest in the published one, layer by layer."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, dtype: str, deviation: float) -> None:
        """deviation: of numbers that are drawn anew, as at the start of a training."""
        self._checkpoint = checkpoint
        self._recipe = recipe
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._deviation = deviation
        self._draws = Draws.of(recipe.seed)
        self._layer: _Layer | None = None

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError."""
        kept: dict[str, Tensor] = {}
        for name, target in targets.items():
            if (found := _MLP.fullmatch(name)) is None:
                kept[name] = target
            elif found["router"]:
                target.copy_(self._router(name, target.shape[1]))
            elif found["shared_gate"]:
                target.zero_()
            elif found["expert"] is None:
                target.copy_(self._shared(self._layer_of(int(found["layer"])), found["matrix"]))
            else:
                target.copy_(self._expert(name, self._layer_of(int(found["layer"])), found["matrix"], found["expert"]))
        if kept:
            self._checkpoint.load(kept)

    def _router(self, name: str, hidden_size: int) -> Tensor:
        """[E, H] float32: a row for each copy, of which each expert has its share drawn anew."""
        recipe = self._recipe
        copies = self._draws.normals(f"{name}/copies", (recipe.experts // recipe.granularity, hidden_size))
        rows = copies.repeat_interleave(recipe.granularity, dim=0)
        return self._redrawn(name, rows * self._deviation)

    def _shared(self, layer: _Layer, matrix: str) -> Tensor:
        """A neuron that is there several times counts once, together."""
        if matrix != "down":
            return layer.matrices[matrix][layer.shared]
        return layer.matrices["down"][:, layer.shared].float() / layer.times[layer.shared]

    def _expert(self, name: str, layer: _Layer, matrix: str, expert: str) -> Tensor:
        """[I / G, H] or [H, I / G] float32."""
        granularity, inner = self._recipe.granularity, layer.copies.shape[1] // self._recipe.granularity
        copy, part = divmod(int(expert), granularity)
        neurons = layer.copies[copy, part * inner : (part + 1) * inner]
        if matrix != "down":
            return self._redrawn(name, layer.matrices[matrix][neurons].float())
        scale = torch.where(layer.times[neurons] > 0, granularity / 2, float(granularity))
        return self._redrawn(name, layer.matrices["down"][:, neurons].float()) * scale

    def _redrawn(self, name: str, values: Tensor) -> Tensor:
        """values, float32, with a share of them drawn anew."""
        if not self._recipe.noise:
            return values
        shape = tuple(values.shape)
        mask = self._draws.mask(f"{name}/mask", shape, self._recipe.noise)
        return torch.where(mask, self._draws.normals(f"{name}/values", shape) * self._deviation, values)

    def _layer_of(self, layer_id: int) -> _Layer:
        if self._layer is None or self._layer.layer_id != layer_id:
            self._layer = None  # frees its matrices before the next ones come
            self._layer = self._load_layer(layer_id)
        return self._layer

    def _load_layer(self, layer_id: int) -> _Layer:
        config, recipe = self._checkpoint.config, self._recipe
        prefix, inner, hidden = f"model.layers.{layer_id}.mlp", config.intermediate_size, config.hidden_size
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        matrices = {matrix: torch.empty(shape, dtype=self._dtype) for matrix, shape in shapes.items()}
        self._checkpoint.load({f"{prefix}.{matrix}_proj.weight": tensor for matrix, tensor in matrices.items()})

        def orders(what: str, count: int) -> Tensor:
            return torch.stack([self._draws.permutation(f"{prefix}.{what}.{i}", inner) for i in range(count)])

        shared = orders("shared_expert", -(-recipe.shared // recipe.granularity))
        shared = shared.flatten()[: inner // recipe.granularity * recipe.shared]
        return _Layer(
            layer_id=layer_id,
            matrices=matrices,
            shared=shared,
            times=torch.bincount(shared, minlength=inner),
            copies=orders("copies", recipe.experts // recipe.granularity),
        )
