"""Weights in fewer bits, divided among ranks and with LoRA adapters, in float32: the logits and greedy tokens of one
process with the same, or with the numbers that they mean."""

import pytest
import torch
from configs import PROMPTS, config, dense
from gptq_tools import write_pair
from lora_tools import write_adapter
from rank_tools import ThreadRanks
from stored_tools import GREEDY, offline, write_awq, write_both, write_packed

from cluster import llm as llm_module
from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.config.quantization import QUANTIZATIONS
from cluster.kernels import nf4, rounding

SIZES = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
RAW = {
    "qwen2": dense(**SIZES),
    "qwen2_moe": config(
        **SIZES, moe_intermediate_size=64, shared_expert_intermediate_size=512, num_experts=4, num_experts_per_tok=2
    ),
}
# Of `quantization`, and how many ranks its groups leave room for.
HERE = {"int8": 4, "int8+lm_head": 4, "int4": 2, "int4-64-zeros": 4, "int4-32": 4, "nf4": 4, "nf4+lm_head": 4}
STORED = {
    "GPTQ": write_pair,
    "GPTQ per column": lambda folder, raw: write_pair(folder, raw, group_size=-1, sym=False),
    "AWQ": write_awq,
    "AWQ of dense layers": lambda folder, raw: write_awq(folder, raw, kept=("self_attn", "gate")),
    "8 bits": write_packed,
    "4 bits with zeros": lambda folder, raw: write_packed(folder, raw, 4, 64, symmetric=False),
}
DEFAULT = [("qwen2", "GPTQ", 2), ("qwen2_moe", "int4-64-zeros", 4)]
"""The others take long together; adapters have a case of nf4."""
CASES = [
    (family, weights, num_ranks)
    for family in RAW
    for weights in (*HERE, *STORED)
    for num_ranks in (2, 4)
    if num_ranks <= HERE.get(weights, 4)
]


@pytest.fixture(autouse=True)
def ranks_as_threads(monkeypatch):
    monkeypatch.setattr(llm_module, "ChildRanks", ThreadRanks)


@pytest.mark.parametrize(
    ("family", "weights", "num_ranks"),
    [pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.slow) for case in CASES],
)
def test_rounded_weights_give_what_they_give_one_process(tmp_path, family, weights, num_ranks):
    if weights in STORED:
        model_dir, _ = STORED[weights](tmp_path, RAW[family])
        options = {}
    else:
        model_dir, options = tmp_path / "model", {"quantization": weights}
        write_checkpoint(model_dir, RAW[family], seed=5)
    found = []
    for size in (1, num_ranks):
        with offline(model_dir, tensor_parallel_size=size, **options) as llm:
            tokens = [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]
            found.append(([llm.logits(prompt) for prompt in PROMPTS], tokens))
    (one_process, its_tokens), (ours, tokens) = found
    for logits, expected in zip(ours, one_process, strict=True):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
    assert tokens == its_tokens


def rounded(matrix, name):
    """The numbers that a form means, by its plain definition; test_oracles.py has bitsandbytes' for nf4."""
    if name == "nf4":
        return nf4.dequantize(nf4.quantize(matrix))
    layout = QUANTIZATIONS[name].layout(matrix.shape[1])
    return rounding.dequantize(rounding.quantize(matrix, layout), layout)


def both(folder, family, weights):
    """Directories of a checkpoint and of the numbers that it has with these weights in float32, and the options."""
    if weights in STORED:
        return *STORED[weights](folder, RAW[family]), {}
    layer = lambda _, matrix: ({"weight": matrix}, rounded(matrix, weights))  # noqa: E731
    return *write_both(folder, RAW[family], {}, layer), {"quantization": weights}


def adapter_for(folder, family):
    draw, inner = torch.Generator().manual_seed(3), "mlp" if family == "qwen2" else "mlp.shared_expert"
    sizes = {
        "self_attn.q_proj": (256, 128), "self_attn.v_proj": (128, 128), "self_attn.o_proj": (128, 256),
        f"{inner}.up_proj": (512, 128), f"{inner}.down_proj": (128, 512),
    }  # fmt: skip
    changes = {
        f"model.layers.{layer_id}.{name}": tuple(
            torch.randn(shape, generator=draw) / 8 for shape in ((2, inputs), (outputs, 2))
        )
        for layer_id in range(2)
        for name, (outputs, inputs) in sizes.items()
    }
    return write_adapter(folder / "adapter", changes)


ADAPTED = [
    (family, weights, num_ranks)
    for family in RAW
    for weights in ("int8", "int4", "nf4", "GPTQ", "AWQ", "8 bits")
    for num_ranks in (1, 2)
]


@pytest.mark.parametrize(
    ("family", "weights", "num_ranks"),
    [pytest.param(*case, marks=() if case == ("qwen2_moe", "nf4", 2) else pytest.mark.slow) for case in ADAPTED],
)
def test_adapters_change_rounded_weights_as_the_numbers_that_they_mean(tmp_path, family, weights, num_ranks):
    """The base and an adapter in one batch; what an adapter of plain weights gives, test_parity_lora.py shows."""
    stored, plain, options = both(tmp_path, family, weights)
    adapters = {"lora_adapters": {"a": str(adapter_for(tmp_path, family))}}
    found = []
    for model_dir, changes in ((plain, {}), (stored, {"tensor_parallel_size": num_ranks, **options})):
        with offline(model_dir, **adapters, **changes) as llm:
            names = [name for name in ("", "a") for _ in PROMPTS]
            tokens = [output.token_ids for output in llm.generate(2 * PROMPTS, GREEDY, adapter=names)]
            logits = [llm.logits(prompt, adapter=name) for prompt, name in zip(2 * PROMPTS, names, strict=True)]
            found.append((logits, tokens))
    (of_plain, its_tokens), (ours, tokens) = found
    for logits, expected in zip(ours, of_plain, strict=True):
        torch.testing.assert_close(logits, expected, atol=2e-3, rtol=0)
    assert tokens == its_tokens
    assert tokens[: len(PROMPTS)] != tokens[len(PROMPTS) :]
