"""The tensors that a `ModelConfig` implies, by name and shape. Knows no files, no tensors, and of a family its shapes.

Names are those of the released checkpoints: experts lie there one by one. `stored_shapes` and `find_source` also know
of experts that lie fused (`fused.py`), and of embeddings that are stored as the head alone.
H hidden, V vocabulary, E experts, I a SwiGLU's inner size.
"""

import math
import re
from collections.abc import Collection

from cluster.checkpoint.fused import Source, fused_shape, fused_source
from cluster.config import DTYPE_BYTES, ModelConfig
from cluster.config.architectures.architecture import Shapes
from cluster.config.architectures.heads import head_shapes
from cluster.config.architectures.registry import architecture_of
from cluster.config.quantization import NF4_BLOCK, PLAIN, QUANTIZATIONS, Quantization
from cluster.errors import SetupError

_NUMBERS = ("qweight", "weight_packed")  # of each `StoredForm`
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Old exports store these beside the weights. They are computed from the config: dropping them changes nothing.
HARMLESS = (
    re.compile(r"(model\.layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
    re.compile(r"model\.rotary_emb\.(original_)?inv_freq"),
    re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.(cos|sin)_cached"),
    re.compile(r"model\.(embeddings\.)?position_ids"),
)


def dense_shapes(config: ModelConfig) -> Shapes:
    """Everything that an attention replica holds: all but the routed experts, in the model's order."""
    return _all_shapes(config, with_experts=False)


def expert_shapes(config: ModelConfig, layer_id: int, expert_id: int) -> Shapes:
    """The three matrices of one routed expert: gate, up, down."""
    of_expert = architecture_of(config).expert_shapes
    assert of_expert is not None, f"{config.model_type} has no experts"
    assert config.is_sparse(layer_id), f"layer {layer_id} has no experts"
    assert 0 <= expert_id < config.num_experts, f"there is no expert {expert_id}"
    return of_expert(config, layer_id, expert_id)


def checkpoint_shapes(config: ModelConfig) -> Shapes:
    """Every tensor of the checkpoint, in the order of released files: a layer's experts follow its others."""
    return _all_shapes(config, with_experts=True)


def stored_shapes(config: ModelConfig, stored: Collection[str]) -> Shapes:
    """As `checkpoint_shapes`, under the names by which a checkpoint with the tensors `stored` has them."""
    shapes = checkpoint_shapes(config)
    for layer_id in config.sparse_layers:
        for expert_id in range(config.num_experts):
            for name, shape in expert_shapes(config, layer_id, expert_id).items():
                source = fused_source(name)
                if source is not None and source.name in stored:
                    del shapes[name]
                    shapes[source.name] = fused_shape(source, shape, config.num_experts)
    if config.tie_word_embeddings and HEAD in stored:
        shapes[HEAD] = shapes.pop(EMBEDDING)
    return shapes if config.stored is None else _rounded_shapes(shapes, config.stored)


def find_source(name: str, stored: Collection[str], *, tied: bool) -> Source | None:
    """Finds a tensor of `checkpoint_shapes` among the stored ones; None where it is absent. Of a matrix that is stored
    rounded, its numbers.

    tied: the embeddings are also the head, and stand under either name.
    """
    if name in stored:
        return Source(name)
    if tied and name == EMBEDDING and HEAD in stored:
        return Source(HEAD)
    for numbers in _NUMBERS:
        if (rounded := f"{name.removesuffix('weight')}{numbers}") in stored:
            return Source(rounded)
    source = fused_source(name)
    return source if source is not None and source.name in stored else None


def is_harmless(name: str) -> bool:
    """Whether a stored tensor that the model does not have may stay unread."""
    return any(pattern.fullmatch(name) for pattern in HARMLESS)


def dense_bytes(config: ModelConfig, dtype: str, quantization: str = PLAIN) -> int:
    """Bytes of an attention replica's weights."""
    rounded = config.stored or QUANTIZATIONS.get(quantization)
    num_bytes = 0
    for name, shape in dense_shapes(config).items():
        if rounded is not None and _is_rounded(name, shape, rounded):
            num_bytes += rounded.matrix_bytes(*shape)
        else:
            num_bytes += math.prod(shape) * DTYPE_BYTES[dtype]
    return num_bytes


def check_blocks(config: ModelConfig, quantization: str, expert_quantization: str) -> None:
    """Raises SetupError for matrices that nf4's blocks do not divide."""
    shapes = {
        quantization: dense_shapes(config),
        expert_quantization: expert_shapes(config, config.sparse_layers[0], 0) if config.sparse_layers else {},
    }
    if quantization == expert_quantization:
        shapes = {quantization: checkpoint_shapes(config)}
    for asked, of_matrices in shapes.items():
        rounded = QUANTIZATIONS.get(asked)
        if rounded is None or not rounded.is_nf4:
            continue
        for name, shape in of_matrices.items():
            if _is_rounded(name, shape, rounded) and shape[1] % NF4_BLOCK:
                raise SetupError(
                    f"quantization is {asked!r}: {name} has {shape[1]} inputs, which its blocks of {NF4_BLOCK} do not "
                    "divide: use int4"
                )


def _is_rounded(name: str, shape: tuple[int, ...], rounded: Quantization) -> bool:
    return len(shape) == 2 and rounded.takes(name.rpartition(".")[0])


def _rounded_shapes(shapes: Shapes, rounded: Quantization) -> Shapes:
    """With the tensors that a rounded matrix is stored in."""
    assert rounded.form is not None
    found: Shapes = {}
    for name, shape in shapes.items():
        if not _is_rounded(name, shape, rounded):
            found[name] = shape
            continue
        found |= rounded.form.shapes(name.removesuffix(".weight"), shape[0], shape[1])
    return found


def _all_shapes(config: ModelConfig, *, with_experts: bool) -> Shapes:
    shapes: Shapes = {EMBEDDING: (config.vocab_size, config.hidden_size)}  # [V, H]
    family = architecture_of(config)
    for layer_id in range(config.num_hidden_layers):
        shapes |= family.layer_shapes(config, layer_id)
        if with_experts and config.is_sparse(layer_id):
            for expert_id in range(config.num_experts):
                shapes |= expert_shapes(config, layer_id, expert_id)
    shapes["model.norm.weight"] = (config.hidden_size,)
    shapes |= head_shapes(config)
    return shapes
