"""Runs in an environment that has llama-cpp-python, gguf, safetensors and torch, and need not have this package.

Lines in and out as in vllm_worker.py. Writes the checkpoint as a bfloat16 GGUF file once, beside its directory, and
from that one with rounded weights, as llama.cpp rounds them.
"""

import ctypes
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

MAX_BATCH_TOKENS = 2048


def main() -> None:
    # This file's neighbours are not for that environment.
    sys.path[:] = [folder for folder in sys.path if folder != os.path.dirname(__file__)]
    options = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp's prints must not get among the answers
    import llama_cpp  # type: ignore[import-not-found]  # in the user's environment only

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # else a line for each of its tensors

    model_dir = Path(options["model"])
    file = model_dir.with_name(f"{model_dir.name}.bf16.gguf")
    if not file.exists():
        partial = file.with_suffix(".partial")
        _write_gguf(model_dir, partial)
        partial.rename(file)
    weights = options["weights"]
    if weights != "bf16":
        file = _rounded(llama_cpp, file, weights)
    model = _Model(llama_cpp, file, options["max_num_seqs"], options["max_model_len"], options["num_threads"])
    size = f"{file.stat().st_size / 1e9:.2f} GB"
    detail = f"llama-cpp-python {llama_cpp.__version__}, {weights} GGUF of {size}, {model.num_threads} threads"
    print(json.dumps({"ready": detail}), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        counts = model.generate(task["prompts"], task["num_tokens"], task["sampling"])
        print(json.dumps({"counts": counts}), file=answers, flush=True)


class _Model:
    """Decoding of several sequences at a time over llama.cpp's batch interface."""

    def __init__(self, api: Any, file: Path, max_sequences: int, max_tokens: int, num_threads: int) -> None:
        self.api = api
        self.num_threads = num_threads
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
        params = api.llama_context_default_params()
        params.n_ctx = max_sequences * max_tokens
        params.n_batch = params.n_ubatch = MAX_BATCH_TOKENS
        params.n_seq_max = max_sequences
        params.n_threads = params.n_threads_batch = self.num_threads
        params.kv_unified = True
        self.context = api.llama_init_from_model(self.model, params)
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch = api.llama_batch_init(MAX_BATCH_TOKENS, 0, 1)

    def generate(self, prompts: list[list[int]], num_tokens: int, sampling: dict[str, Any]) -> list[int]:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        chooser = _Chooser(
            self.api, self.context, self.vocab_size, prompts=prompts, num_tokens=num_tokens, sampling=sampling
        )  # fmt: skip
        newest: dict[int, int] = {}
        for start in range(0, len(rows), MAX_BATCH_TOKENS):
            newest |= self._decode(rows[start : start + MAX_BATCH_TOKENS], chooser)
        for step in range(num_tokens - 1):
            rows = [(newest[s], len(prompts[s]) + step, s, True) for s in range(len(prompts))]
            newest = self._decode(rows, chooser)
        chooser.close()
        return [num_tokens] * len(newest)

    def _decode(self, rows: list[tuple[int, int, int, bool]], chooser: "_Chooser") -> dict[int, int]:
        """rows: token, position, sequence, whether its logits are wanted. Returns the next token by sequence."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode failed on {len(rows)} tokens")
        return {row[2]: chooser.choose(row[2], i) for i, row in enumerate(rows) if row[3]}


class _Chooser:
    """llama.cpp's samplers, a chain for each sequence. Greedy tokens by numpy's argmax, which is faster than theirs.

    sampling: fields of `cluster.bench.sampling.Sampling`.
    """

    def __init__(
        self, api: Any, context: Any, vocab_size: int, *, prompts: list[list[int]], num_tokens: int,
        sampling: dict[str, Any],
    ) -> None:  # fmt: skip
        self.api, self.context, self.vocab_size, self.sampling = api, context, vocab_size, sampling
        self.plain = sampling["temperature"] == 0 and sampling["repetition_penalty"] == 1
        self.chains = []
        for seed, prompt in enumerate([] if self.plain else prompts):
            chain = self._chain(seed, len(prompt) + num_tokens)
            self.chains.append(chain)
            for token in prompt:
                api.llama_sampler_accept(chain, token)

    def choose(self, sequence: int, place: int) -> int:
        """place: of its logits in the batch."""
        if self.sampling["logprobs"] is not None:
            self._likeliest(place, self.sampling["logprobs"])
        if self.plain:
            return int(self._logits(place).argmax())
        return int(self.api.llama_sampler_sample(self.chains[sequence], self.context, place))

    def close(self) -> None:
        for chain in self.chains:
            self.api.llama_sampler_free(chain)

    def _chain(self, seed: int, max_tokens: int) -> Any:
        """top_k before the temperature, which changes no order: the distribution is the same and less is computed."""
        api, sampling = self.api, self.sampling
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        parts = []
        if (penalty := sampling["repetition_penalty"]) != 1:
            parts.append(api.llama_sampler_init_penalties(self.vocab_size, max_tokens, penalty, 0.0, 0.0))
        if sampling["temperature"] == 0:
            parts.append(api.llama_sampler_init_greedy())
        else:
            if sampling["top_k"]:
                parts.append(api.llama_sampler_init_top_k(sampling["top_k"]))
            parts.append(api.llama_sampler_init_temp(sampling["temperature"]))
            if sampling["top_p"] < 1:
                parts.append(api.llama_sampler_init_top_p(sampling["top_p"], 1))
            if sampling["min_p"]:
                parts.append(api.llama_sampler_init_min_p(sampling["min_p"], 1))
            parts.append(api.llama_sampler_init_dist(seed))
        for part in parts:
            api.llama_sampler_chain_add(chain, part)
        return chain

    def _logits(self, place: int) -> Any:
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, place), (self.vocab_size,))

    def _likeliest(self, place: int, num_top: int) -> list[tuple[int, float]]:
        """Its C interface has none, so as its Python server does: from the logits, but without sorting them all."""
        logits = self._logits(place)
        top = np.argpartition(logits, -num_top)[-num_top:]
        total = logits.max() + np.log(np.exp(logits - logits.max()).sum())
        return [(int(token), float(logits[token] - total)) for token in top]


def _rounded(api: Any, file: Path, weights: str) -> Path:
    """The GGUF file with these weights, beside that in bfloat16."""
    found = file.with_name(f"{file.name.removesuffix('.bf16.gguf')}.{weights}.gguf")
    if not found.exists():
        partial = found.with_suffix(".partial")
        params = api.llama_model_quantize_default_params()
        params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{weights.upper()}")
        if api.llama_model_quantize(str(file).encode(), str(partial).encode(), ctypes.byref(params)):
            raise RuntimeError(f"{found} could not be written")
        partial.rename(found)
    return found


def _write_gguf(model_dir: Path, file: Path) -> None:
    """Names and shapes: llama.cpp's architectures qwen2moe and qwen2."""
    import gguf  # type: ignore[import-not-found]
    from safetensors import safe_open

    config = json.loads((model_dir / "config.json").read_text())
    files: list[Any] = [safe_open(part, "pt") for part in sorted(model_dir.glob("*.safetensors"))]
    where = {name: part for part in files for name in part.keys()}  # noqa: SIM118  not a dict
    writer = gguf.GGUFWriter(file, "qwen2moe" if "num_experts" in config else "qwen2")
    _write_shapes(writer, config)
    copy = _TensorCopy(writer, gguf.GGMLQuantizationType.BF16, where)
    copy.add("token_embd.weight", "model.embed_tokens.weight")
    copy.add("output_norm.weight", "model.norm.weight")
    if "lm_head.weight" in where:  # else it is the embeddings, to llama.cpp too
        copy.add("output.weight", "lm_head.weight")
    for layer in range(config["num_hidden_layers"]):
        _write_layer(copy, layer, config.get("num_experts", 0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def _write_shapes(writer: Any, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


class _TensorCopy:
    """Copies tensors from the checkpoint's files (`where`, by name) into a GGUF file."""

    def __init__(self, writer: Any, bfloat16: Any, where: dict[str, Any]) -> None:
        self.writer = writer
        self.bfloat16 = bfloat16
        self.where = where

    def add(self, name: str, *sources: str, full: bool = False, flat: bool = False) -> None:
        """Several sources are stacked. With `full`, with `flat`, or with one dimension: float32; else bfloat16."""
        import torch

        tensors = [self.where[source].get_tensor(source) for source in sources]
        tensor = tensors[0] if len(tensors) == 1 else torch.stack(tensors)
        if flat or tensor.dim() == 1:
            self.writer.add_tensor(name, tensor.float().flatten().numpy())
        elif full:
            self.writer.add_tensor(name, tensor.float().numpy())
        else:
            raw = tensor.bfloat16().contiguous().view(torch.uint8).numpy()
            self.writer.add_tensor(name, raw, raw_dtype=self.bfloat16)


def _write_layer(copy: _TensorCopy, layer: int, num_experts: int) -> None:
    ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
    copy.add(f"{theirs}.attn_norm.weight", f"{ours}.input_layernorm.weight")
    copy.add(f"{theirs}.ffn_norm.weight", f"{ours}.post_attention_layernorm.weight")
    for short, long in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj")):
        copy.add(f"{theirs}.attn_{short}.weight", f"{ours}.self_attn.{long}.weight")
        copy.add(f"{theirs}.attn_{short}.bias", f"{ours}.self_attn.{long}.bias")
    copy.add(f"{theirs}.attn_output.weight", f"{ours}.self_attn.o_proj.weight")
    if not num_experts:
        for part in ("gate", "up", "down"):
            copy.add(f"{theirs}.ffn_{part}.weight", f"{ours}.mlp.{part}_proj.weight")
        return
    copy.add(f"{theirs}.ffn_gate_inp.weight", f"{ours}.mlp.gate.weight", full=True)
    copy.add(f"{theirs}.ffn_gate_inp_shexp.weight", f"{ours}.mlp.shared_expert_gate.weight", flat=True)
    for part in ("gate", "up", "down"):
        copy.add(f"{theirs}.ffn_{part}_shexp.weight", f"{ours}.mlp.shared_expert.{part}_proj.weight")
        experts = [f"{ours}.mlp.experts.{i}.{part}_proj.weight" for i in range(num_experts)]
        copy.add(f"{theirs}.ffn_{part}_exps.weight", *experts)


if __name__ == "__main__":
    main()
