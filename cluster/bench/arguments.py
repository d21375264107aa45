"""The arguments of `moe-cluster bench`. Imports no torch: `--help` answers at once."""

import argparse
from pathlib import Path

from cluster.bench.argument_types import Names, drafts, numbers, variable
from cluster.bench.planning.arguments import add_calibrate_arguments, add_check_arguments, add_scale_arguments
from cluster.bench.sampling import CHECKPOINT, SAMPLINGS
from cluster.bench.serve_arguments import add_prefix_arguments, add_serve_arguments, listed_samplings
from cluster.bench.spec import LLAMA_FORMS
from cluster.bench.stored_forms import STORED
from cluster.checkpoint.made.published import SHAPES
from cluster.config.quantization import PLAIN, QUANTIZATIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's parts and their arguments to its parser."""
    parts = parser.add_subparsers(dest="bench", required=True, metavar="PART")
    for name, text in (
        ("throughput", "tokens/s of prefill and decode at several batch sizes, side by side"),
        ("latency", "milliseconds to the first token and between tokens, side by side"),
    ):
        _add_system_arguments(parts.add_parser(name, help=text, description=text), latency=name == "latency")
    text = "each CPU kernel's speed beside torch's own and a plain read of memory, by variant and threads"
    _add_kernels_arguments(parts.add_parser("kernels", help=text, description=text))
    text = "round trips of token batches to expert shards, without the experts' products, by carrier and rows"
    _add_transport_arguments(parts.add_parser("transport", help=text, description=text))
    text = "milliseconds of a decode step against batch, context, shards and layers, one at a time"
    _add_growth_arguments(parts.add_parser("growth", help=text, description=text))
    text = "tokens/s and memory of one sequence against the length of its context, on a tiny model"
    _add_context_arguments(parts.add_parser("context", help=text, description=text))
    text = "full-size Qwen1.5-MoE-A2.7B on one GPU, in one process and split, beside the bound of its memory"
    _add_gpu_arguments(parts.add_parser("gpu", help=text, description=text))
    text = "a running server over gRPC: percentiles of time to first token and between tokens, tokens/s"
    add_serve_arguments(parts.add_parser("serve", help=text, description=text))
    text = "what `plan --calibration` has to know of a model on this machine, into a file"
    calibrate = parts.add_parser("calibrate", help=text, description=text)
    text = "the planner's answers beside measured runs of other settings than the calibration's"
    check = parts.add_parser("plan-check", help=text, description=text)
    text = "a cluster's requests/s against its attention replicas and expert shards"
    scale = parts.add_parser("scale", help=text, description=text)
    for planned in (calibrate, check, scale):
        _add_made_or_given_model(planned)
    add_calibrate_arguments(calibrate)
    add_check_arguments(check)
    add_scale_arguments(scale)
    text = "running servers in turns, with prompts that begin alike: the caches' hit rate and time to first token"
    add_prefix_arguments(parts.add_parser("prefixes", help=text, description=text))


def _add_transport_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", type=int, default=2, metavar="N", help="expert shards (default: 2)")
    parser.add_argument(
        "--rows", type=numbers, default=(1, 8, 64, 512, 2048), metavar="NUMBERS",
        help="rows for each shard at a time (default: 1,8,64,512,2048)",
    )  # fmt: skip
    parser.add_argument("--hidden-size", type=int, default=2048, metavar="H", help="of a row (default: 2048)")
    parser.add_argument("--repeat", type=int, default=200, metavar="N", help="round trips each (default: 200)")
    parser.add_argument(
        "--ray-address", metavar="ADDRESS",
        help="a running Ray cluster, to measure between its hosts (default: a Ray of this machine is started)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too, for machines to read")


def _add_kernels_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model_dir", metavar="MODEL", nargs="?", type=Path,
        help="its config.json has the shapes to measure; no weights are read (default: Qwen1.5-MoE-A2.7B's shapes)",
    )  # fmt: skip
    known = ("products", "quantized", "experts", "attention", "sampling", "masks")
    parser.add_argument(
        "--kernels", type=Names(*known), default=known, metavar="NAMES",
        help=f"the kernels to measure (default: {','.join(known)})",
    )  # fmt: skip
    for name, default, text in (
        ("batch", (1, 8, 32), "sequences in a step"),
        ("context", (64, 1024, 4096), "tokens of a sequence, for attention"),
        ("threads", (), "threads"),
    ):
        shown = ",".join(map(str, default)) or "1 and all cores"
        parser.add_argument(
            f"--{name}", type=numbers, default=default, metavar="NUMBERS", help=f"{text} (default: {shown})"
        )
    samplings = ("greedy", "chat", "top-p", "logprobs")
    parser.add_argument(
        "--sampling", type=Names(*SAMPLINGS, CHECKPOINT), default=samplings, metavar="NAMES",
        help=f"ways to choose tokens (default: {','.join(samplings)}): {listed_samplings()}",
    )  # fmt: skip
    _add_dtype_argument(parser)
    parser.add_argument(
        "--repeat", type=int, default=7, metavar="N", help="rounds, of which the least counts (default: 7)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too, for machines to read")


def _add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="data type of the weights (default: auto, the checkpoint's own)",
    )


def _add_growth_arguments(parser: argparse.ArgumentParser) -> None:
    _add_made_checkpoint_arguments(parser)
    for name, default, text in (
        ("batch", (1, 2, 4, 8, 16, 32), "sequences in a step"),
        ("context", (64, 256, 1024), "tokens of a prompt"),
        ("shards", (1, 2, 4), "expert shards"),
    ):
        shown = ",".join(map(str, default))
        parser.add_argument(
            f"--{name}", type=numbers, default=default, metavar="NUMBERS", help=f"{text} (default: {shown})"
        )
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs after one warm-up (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too, for machines to read")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it too, as PNG (needs matplotlib)")


def _add_context_arguments(parser: argparse.ArgumentParser) -> None:
    lengths = (4096, 16384, 65536, 131072)
    parser.add_argument(
        "--context", type=numbers, default=lengths, metavar="NUMBERS", help=f"tokens of a prompt (default: {lengths})"
    )
    parser.add_argument("--chunk", type=int, default=2048, metavar="N", help="of these in a step (default: 2048)")
    parser.add_argument("--window", type=int, metavar="N", help="tokens that a layer sees (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too, for machines to read")


def _add_gpu_arguments(parser: argparse.ArgumentParser) -> None:
    for name, default, text in (
        ("layers", 24, "layers of the model"),
        ("batch", 192, "requests at a time"),
        ("prompt-tokens", 1000, "tokens of a prompt"),
        ("output-tokens", 1000, "tokens to generate"),
        ("shards", 1, "expert shards of the split, on the same GPU"),
        ("repeat", 3, "runs after one warm-up"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument(
        "--systems", type=Names("local", "no-graphs", "stream"), default=("local", "no-graphs", "stream"),
        metavar="NAMES", help="one process with CUDA graphs, or without, or split with them (default: all three)",
    )  # fmt: skip
    parser.add_argument(
        "--quantization", type=Names(PLAIN, *QUANTIZATIONS), default=(PLAIN,), metavar="NAMES",
        help=f"forms of weights, experts included, one after another (default: {PLAIN}): int8, int4, nf4 and others",
    )  # fmt: skip
    parser.add_argument(
        "--sampling", type=Names(*SAMPLINGS), default=("greedy",), metavar="NAMES",
        help=f"how tokens are chosen, one way after another (default: greedy): {listed_samplings()}",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint-dir", type=Path, metavar="DIR",
        help="where the made config and tokenizer are kept (default: ~/.cache/moe-cluster/checkpoints)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too, for machines to read")


def _add_made_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", choices=("demo", *SHAPES), default="a2.7b", metavar="NAME",
        help="of the made checkpoint: those of a released model (a2.7b: 5.8 GB with 4 layers), or the tiny demo's "
        f"(default: %(default)s): demo, {', '.join(SHAPES)}",
    )  # fmt: skip
    parser.add_argument(
        "--layers", type=int, metavar="N",
        help="layers of a made checkpoint, not of the demo's (default: all of a dense model, 4 of a MoE model)",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint-dir",
        type=Path,
        metavar="DIR",
        help="where made checkpoints are kept for the next time (default: ~/.cache/moe-cluster/checkpoints)",
    )


def _add_made_or_given_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model_dir",
        metavar="MODEL",
        nargs="?",
        type=Path,
        help="checkpoint to measure on, its directory or its name on the hub; without it one with random weights is "
        "made (see --shapes)",
    )
    _add_made_checkpoint_arguments(parser)


def _add_system_arguments(parser: argparse.ArgumentParser, latency: bool) -> None:
    _add_made_or_given_model(parser)
    _add_compared_arguments(parser)
    parser.add_argument(
        "--shards", type=int, default=2, metavar="N", help="expert shards with stream and ray (default: 2)"
    )
    parser.add_argument(
        "--batch",
        type=numbers,
        default=(1,) if latency else (1, 8, 32),
        metavar="NUMBERS",
        help=f"prompts at a time (default: {'1' if latency else '1,8,32'})",
    )
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="tokens of a prompt (default: 64)")
    parser.add_argument("--output-tokens", type=int, default=32, metavar="N", help="tokens to generate (default: 32)")
    parser.add_argument(
        "--sampling", type=Names(*SAMPLINGS, CHECKPOINT), default=("greedy",), metavar="NAMES",
        help=f"how every system chooses tokens, one after another in turns (default: greedy): {listed_samplings()}",
    )  # fmt: skip
    _add_variant_arguments(parser)
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs after one warm-up (default: 3)")
    parser.add_argument(
        "--turns", action="store_true",
        help="load all systems at once and let them take turns, run by run: fairer where the machine's speed wanders, "
        "but all must fit into memory",
    )  # fmt: skip
    _add_dtype_argument(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too, for machines to read")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it too, as PNG (needs matplotlib)")


def _add_variant_arguments(parser: argparse.ArgumentParser) -> None:
    """Those whose every value makes a system of its own."""
    parser.add_argument(
        "--quantization", type=Names(PLAIN, *QUANTIZATIONS, *STORED), default=(PLAIN,), metavar="NAMES",
        help="weights of this package's systems, rounded while they are loaded; each name is a system of its own "
        f"(default: {PLAIN}, as the checkpoint has them): int8; int4, with groups of 128 inputs, int4-32, int4-64, "
        "each also with -zeros; nf4; with +lm_head the last layer's too; or gptq, awq, w8a16: random numbers as such a "
        "checkpoint has them",
    )  # fmt: skip
    parser.add_argument(
        "--speculative-config", type=drafts, action="append", metavar="JSON",
        help="of this package's systems, as of `serve`, or none; may be repeated, each is a system of its own "
        "(default: none). A model of draft_model may be one of --shapes: it is made",
    )  # fmt: skip
    parser.add_argument(
        "--adapters", type=numbers, default=(0,), metavar="NUMBERS",
        help="LoRA adapters of rank 16 for this package's systems, which the prompts of a batch have in turns; each "
        "number is a system of its own (default: 0, the base alone)",
    )  # fmt: skip


def _add_compared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--transports",
        type=Names("local", "stream", "ray"),
        default=("local", "stream", "ray"),
        metavar="NAMES",
        help="what to measure: local (one process); experts on Ray actors, reached over stream or ray "
        "(default: local,stream,ray)",
    )
    parser.add_argument(
        "--compare",
        type=Names("transformers", "vllm", "llama.cpp"),
        default=(),
        metavar="NAMES",
        help="measure these in the same run (transformers, vllm, llama.cpp), and give all as ratios to the first",
    )
    parser.add_argument("--vllm-python", default="", metavar="FILE", help="the Python of an environment that has vLLM")
    parser.add_argument(
        "--llama-python", default="", metavar="FILE",
        help="the Python of an environment that has llama-cpp-python, gguf, safetensors and torch",
    )  # fmt: skip
    parser.add_argument(
        "--llama-weights", type=Names("bf16", *LLAMA_FORMS), default=("bf16",), metavar="NAMES",
        help=f"llama.cpp's weights, each a system of its own: bf16, {', '.join(LLAMA_FORMS)} (default: bf16)",
    )  # fmt: skip
    parser.add_argument(
        "--vllm-env", type=variable, action="append", default=[], metavar="NAME=VALUE",
        help="a variable for vLLM's process, to tune it; may be repeated",
    )  # fmt: skip
