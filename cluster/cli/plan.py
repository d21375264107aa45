"""The command plan: a model's parameters, where its experts go, its bytes; and the hardware that a load needs."""

import argparse
import json
from typing import TYPE_CHECKING

from cluster.cli import capacity, trace
from cluster.cli.arguments import Commands, add_adapters, add_command, add_options

if TYPE_CHECKING:
    from cluster.config import EngineConfig

DEFAULT_SHARDS = 2


def add_commands(commands: Commands) -> None:
    text = "show which expert goes where and how many bytes, and the hardware that a load needs, without loading"
    plan = add_command(commands, "plan", _plan, text)
    plan.add_argument(
        "model", metavar="MODEL", help="directory of a checkpoint, or its name on the hub; its config.json is enough"
    )
    plan.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="expert shards (default: 2, or as many as --rate needs)",
    )
    plan.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto: the checkpoint's (default)")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    add_options(plan, "max_model_len", "rope_scaling", "quantization", "expert_quantization", "kv_cache_dtype")
    add_options(plan, "tensor_parallel_size", "speculative_config")
    add_adapters(plan)
    capacity.add_arguments(plan)
    trace.add_arguments(plan)


def _plan(args: argparse.Namespace) -> int:
    from cluster.checkpoint.draft import check_draft
    from cluster.checkpoint.info import max_model_len, resolve_dtype
    from cluster.checkpoint.model_files import model_directory, pinned
    from cluster.checkpoint.sizes import sizes_of
    from cluster.checkpoint.tokenizer_files import has_vocabulary
    from cluster.config.tensor_parallel import shares_of
    from cluster.console import Plan, describe_plan, print_plan
    from cluster.console.capacity import describe_capacity, describe_replay, print_capacity, print_replay
    from cluster.engine.preflight import adapter_bytes, check_for_plan, download_bytes
    from cluster.experts.placement import num_shards_for, plan_evenly

    capacity.check(args)
    trace.check(args)
    engine = _engine(args)
    model = pinned(args.model)
    directory = model_directory(model)
    config = check_for_plan(model, engine, DEFAULT_SHARDS if args.shards is None else args.shards)
    draft = check_draft(directory, config, engine)
    dtype = resolve_dtype(args.dtype, config)
    rounded = {"quantization": engine.quantization, "cache_dtype": engine.cache_dtype(dtype)}
    sizes = sizes_of(config, dtype, expert_quantization=engine.of_experts, **rounded)
    hardware = capacity.capacity(args, config, sizes, engine)
    answered = trace.replayed(args, config, sizes, engine)
    asked = args.shards
    if asked is None:
        asked = DEFAULT_SHARDS if hardware is None else hardware.trial.cluster.shards
    placement = plan_evenly(config.sparse_layers, config.num_experts, num_shards_for(config.num_experts, asked))
    plan = Plan(
        config=config,
        placement=placement,
        sizes=sizes,
        context_tokens=max_model_len(config, engine),
        download_bytes=download_bytes(model, placement),
        has_tokenizer=has_vocabulary(directory),
        adapter_bytes=adapter_bytes(config, engine),
        draft=None if draft is None else sizes_of(draft, dtype, **rounded),
        ranks=[sizes_of(share.config, dtype, **rounded) for share in shares_of(config, engine.tensor_parallel_size)],
    )
    if args.json:
        more = {} if hardware is None else {"capacity": describe_capacity(hardware)}
        more |= {} if answered is None else {"trace": describe_replay(answered)}
        print(json.dumps(describe_plan(plan) | more, indent=2))
        return 0
    print_plan(plan)
    if hardware is not None:
        print_capacity(hardware)
    if answered is not None:
        print_replay(answered)
    return 0


def _engine(args: argparse.Namespace) -> "EngineConfig":
    from cluster.checkpoint.model_files import located, pinned
    from cluster.config import DEFAULTS, EngineConfig
    from cluster.config.speculation import with_model

    return EngineConfig(
        dtype=args.dtype,
        rope_scaling=args.rope_scaling,
        max_model_len=args.max_model_len,
        quantization=args.quantization,
        expert_quantization=args.expert_quantization,
        lora_adapters=args.lora_adapters,
        max_lora_rank=args.max_lora_rank,
        max_loras=args.max_loras,
        speculative_config=with_model(args.speculative_config, lambda name: pinned(located(name))),
        kv_cache_dtype=args.kv_cache_dtype,
        tensor_parallel_size=args.tensor_parallel_size,
        max_num_seqs=DEFAULTS["max_num_seqs"] if args.max_num_seqs is None else args.max_num_seqs,
    )
