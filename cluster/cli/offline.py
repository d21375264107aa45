"""The commands that need no cluster: plan, doctor, ray-env, keys."""

import argparse
import json
import shlex
import sys

from cluster.cli import doctor
from cluster.cli.arguments import Commands, add_adapters, add_command, add_options


def add_commands(commands: Commands) -> None:
    plan = add_command(
        commands, "plan", _plan, "show parameters, which expert goes where and how many bytes, without loading"
    )
    plan.add_argument(
        "model", metavar="MODEL", help="directory of a checkpoint, or its name on the hub; its config.json is enough"
    )
    plan.add_argument(
        "--shards",
        type=int,
        default=2,
        metavar="N",
        help="expert shards (default: %(default)s)",
    )
    plan.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto: the checkpoint's (default)")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    add_options(plan, "max_model_len", "rope_scaling", "quantization", "expert_quantization", "kv_cache_dtype")
    add_options(plan, "tensor_parallel_size", "speculative_config")
    add_adapters(plan)

    doctor.parser(add_command(commands, "doctor", doctor.run, "show what this machine and installation have and lack"))

    add_command(commands, "ray-env", _ray_env, "print what `ray start` needs in its environment, for a shell to eval")

    keys = add_command(commands, "keys", _keys_new, "make API keys for clients")
    new = keys.add_subparsers(metavar="ACTION", required=True).add_parser(
        "new", help="print a fresh key, and its line for the file of --api-keys-file or --admin-keys-file"
    )
    new.add_argument("name", metavar="NAME", help="of its client, for logs and for turns between clients")


def _plan(args: argparse.Namespace) -> int:
    from cluster.checkpoint.draft import check_draft
    from cluster.checkpoint.info import max_model_len, resolve_dtype
    from cluster.checkpoint.model_files import located, model_directory, pinned
    from cluster.checkpoint.sizes import sizes_of
    from cluster.checkpoint.tokenizer_files import has_vocabulary
    from cluster.config import EngineConfig
    from cluster.config.speculation import with_model
    from cluster.config.tensor_parallel import shares_of
    from cluster.console import Plan, describe_plan, print_plan
    from cluster.engine.preflight import adapter_bytes, check_for_plan, download_bytes
    from cluster.experts.placement import num_shards_for, plan_evenly

    engine = EngineConfig(
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
    )
    model = pinned(args.model)
    directory = model_directory(model)
    config = check_for_plan(model, engine, args.shards)
    draft = check_draft(directory, config, engine)
    dtype = resolve_dtype(args.dtype, config)
    rounded = {"quantization": engine.quantization, "cache_dtype": engine.cache_dtype(dtype)}
    placement = plan_evenly(config.sparse_layers, config.num_experts, num_shards_for(config.num_experts, args.shards))
    plan = Plan(
        config=config,
        placement=placement,
        sizes=sizes_of(config, dtype, expert_quantization=engine.of_experts, **rounded),
        context_tokens=max_model_len(config, engine),
        download_bytes=download_bytes(model, placement),
        has_tokenizer=has_vocabulary(directory),
        adapter_bytes=adapter_bytes(config, engine),
        draft=None if draft is None else sizes_of(draft, dtype, **rounded),
        ranks=[sizes_of(share.config, dtype, **rounded) for share in shares_of(config, engine.tensor_parallel_size)],
    )
    if args.json:
        print(json.dumps(describe_plan(plan), indent=2))
    else:
        print_plan(plan)
    return 0


def _ray_env(args: argparse.Namespace) -> int:
    from cluster.runtime.front.haproxy import ray_environment

    print("umask 077")  # so that only this user can open Ray's files and sockets
    for name, value in ray_environment().items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def _keys_new(args: argparse.Namespace) -> int:
    from cluster.serving.admission.api_keys import new_key

    key, line = new_key(args.name)
    print(f"the key, for its user; it is kept nowhere:\n{key}\nits line for the file of keys:", file=sys.stderr)
    print(line)
    return 0
