"""The command line. Reads arguments and the environment, prints; everything else is done elsewhere.

Exit codes: 0 done, 1 a request or a bench failed, 2 wrong usage or a set-up that cannot work, 130 Ctrl-C.
"""

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from cluster import bench, chaos, connect
from cluster.config import ClusterConfig
from cluster.config.local_address import find_address
from cluster.errors import ClusterError, SetupError
from cluster.version import __version__

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that drain and stop what was started
DEMO_QUESTION = "Which experts answered this question?"
DEMO_METRICS = (
    "moecluster_requests_total",
    "moecluster_generated_tokens_total",
    "moecluster_time_to_first_token_seconds_sum",
    "moecluster_engine_step_seconds_count",
    "moecluster_dispatch_rows_total",
    "moecluster_controller_up_shards",
    "moecluster_controller_plan_epoch",
)
EPILOG = """\
a first look, on any machine:   moe-cluster demo
your own checkpoint:            moe-cluster serve /path/to/Qwen1.5-MoE-A2.7B-Chat
then, in another terminal:      moe-cluster chat
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = _parser().parse_args(bench.with_part(sys.argv[1:] if argv is None else argv))
    try:
        code: int = args.run(args)
        return code
    except SetupError as error:
        print(f"moe-cluster: {error}", file=sys.stderr)
        return 2
    except ClusterError as error:
        print(f"moe-cluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-cluster",
        description="Serve Qwen2-MoE models with attention and experts in processes of their own, on Ray.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = _command(commands, "demo", _demo, "make a tiny random model, serve it here, ask it a question")
    demo.add_argument("--keep", action="store_true", help="leave the cluster running until Ctrl-C")
    _add_cluster_arguments(demo)
    demo.set_defaults(grpc_port=0, metrics_port=0)

    serve = _command(commands, "serve", _serve, "serve a checkpoint from this machine until Ctrl-C")
    serve.add_argument(
        "model", metavar="MODEL_DIR", help="directory of a qwen2_moe checkpoint (config.json, *.safetensors)"
    )
    _add_cluster_arguments(serve)
    _add_security_arguments(serve)

    generate = _command(commands, "generate", _generate, "send a prompt to a running server, stream the answer")
    generate.add_argument("prompt", metavar="PROMPT", help="the text to go on with (no chat template)")
    _add_client_arguments(generate)

    chat = _command(commands, "chat", _chat, "talk with a running server; an empty line or Ctrl-D ends it")
    chat.add_argument("--system", help="system message; default: the chat template's own")
    _add_client_arguments(chat)

    plan = _command(commands, "plan", _plan, "show which expert goes where and how many bytes, without loading")
    plan.add_argument("model", metavar="MODEL_DIR", help="directory of a qwen2_moe checkpoint")
    plan.add_argument("--shards", type=int, default=2, metavar="N", help="expert shards (default: %(default)s)")
    plan.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto: the checkpoint's (default)")

    status = _command(commands, "status", _status, "show a running cluster: processes, loads of experts, faults")
    _add_ray_address(status)
    top = _command(commands, "top", _top, "show a running cluster, live, until Ctrl-C")
    top.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="default: %(default)s")
    _add_ray_address(top)
    rebalance = _command(commands, "rebalance", _rebalance, "move experts of a running cluster to where the load is")
    _add_ray_address(rebalance)
    roll = _command(commands, "roll", _roll, "give controller and shards new processes, as for a new version")
    _add_ray_address(roll)
    scale = _command(commands, "scale", _scale, "change how many processes a running cluster has, one at a time")
    scale.add_argument("--expert-shards", type=int, metavar="N", help="processes that share the routed experts")
    scale.add_argument("--attention-replicas", type=int, metavar="N", help="processes with dense weights and KV cache")
    _add_ray_address(scale)

    _command(commands, "ray-env", _ray_env, "print what `ray start` needs in its environment, for a shell to eval")

    chaos_parser = _command(commands, "chaos", _chaos, "break a running cluster part by part under streams, compare")
    chaos.add_arguments(chaos_parser)
    _add_ray_address(chaos_parser)

    keys = _command(commands, "keys", _keys_new, "make API keys for clients")
    new = keys.add_subparsers(metavar="ACTION", required=True).add_parser(
        "new", help="print a fresh key, and its line for the file of --api-keys-file"
    )
    new.add_argument("name", metavar="NAME", help="whose it is: what logs and fairness between clients go by")

    bench.add_arguments(_command(commands, "bench", bench.run, "measure tokens/s, side by side with other engines"))
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help_text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help_text, description=help_text[0].upper() + help_text[1:] + "."
    )
    parser.set_defaults(run=run)
    return parser


def _add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ClusterConfig`, with its defaults, and of this machine's ports."""
    default = {f.name: f.default for f in fields(ClusterConfig)}

    def add(name: str, kind: type, text: str, metavar: str = "N") -> None:
        shown = "" if default[name] is None else f" (default: {default[name]})"
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=default[name], metavar=metavar, help=text + shown)

    add("expert_shards", int, "processes that share the routed experts")
    add("attention_replicas", int, "processes with the dense weights and a KV cache")
    add("min_copies", int, "copies of each expert, on different shards")
    add("redundant_experts", int, "further copies a layer, of the busiest experts")
    add("dtype", str, "float32, bfloat16, float16 or auto: the checkpoint's", "TYPE")
    add("device", str, "cpu, cuda or auto: cuda where there is one", "DEVICE")
    add("transport", str, "auto (streams, and Ray calls while one is down), stream or ray", "NAME")
    add("kv_cache_bytes", int, "memory for keys and values, for each attention replica", "BYTES")
    add("max_num_seqs", int, "sequences in one step at most")
    add("max_num_batched_tokens", int, "tokens in one step at most, prefill and decode together")
    add("max_model_len", int, "prompt and output at most, default: what the checkpoint allows")
    add("max_waiting", int, "requests that may queue for a replica before a further one is refused")
    add("gpus_per_attention_replica", float, "GPUs, fractions allowed; default: 1 where Ray has any", "X")
    add("gpus_per_expert_shard", float, "GPUs, fractions allowed; default: 1 where Ray has any", "X")
    for role in ("attention_replica", "expert_shard"):
        parser.add_argument(
            f"--cpus-per-{role.replace('_', '-')}", type=float, metavar="X",
            help="CPU threads (default: this machine's cores divided by the processes of the role; 1 elsewhere)",
        )  # fmt: skip
    add("recovery_timeout_s", float, "how long requests wait for a lost shard's successor", "SECONDS")
    add("drain_timeout_s", float, "how long a stop waits for running requests", "SECONDS")
    add("metrics_port", int, "where /metrics is served; 0: a free port (demo: 0)", "PORT")
    add("log_format", str, "of all processes' log lines: text, or json, one object a line", "FORMAT")
    parser.add_argument(
        "--grpc-port", type=int, default=9000, metavar="PORT", help="0: a free one (default: 9000, demo: 0)"
    )
    parser.add_argument(
        "--proxy", choices=("haproxy", "serve"), default="haproxy",
        help="what takes the connections: HAProxy, or Serve's own proxy (default: %(default)s; "
        "a running Ray cluster decides by its environment)",
    )  # fmt: skip
    _add_ray_address(parser, "else a Ray of this machine is started")


def _add_security_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-keys-file",
        default="",
        metavar="FILE",
        help="with hashed keys (`moe-cluster keys new`); clients need one",
    )
    parser.add_argument(
        "--max-streams-per-client",
        type=int,
        default=0,
        metavar="N",
        help="requests of a client at a time (default: any)",
    )
    parser.add_argument(
        "--host", default="", metavar="HOST", help="where gRPC listens; 0.0.0.0: on all interfaces (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="PEM of this server's certificate and chain: TLS only"
    )
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM of its key (default: in the same file)")
    parser.add_argument(
        "--tls-client-ca", type=Path, metavar="FILE", help="PEM of who signs clients' certificates; they need one then"
    )


def _add_ray_address(parser: argparse.ArgumentParser, otherwise: str = "else that of `moe-cluster serve` here") -> None:
    parser.add_argument(
        "--ray-address", default=os.environ.get("RAY_ADDRESS"), metavar="ADDRESS",
        help=f"a running Ray cluster (default: $RAY_ADDRESS, {otherwise})",
    )  # fmt: skip


def _add_client_arguments(parser: argparse.ArgumentParser) -> None:
    connect.add_arguments(parser)
    parser.add_argument("--max-tokens", type=int, metavar="N", help="tokens of answer at most")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (default: the checkpoint's)")
    parser.add_argument("--top-p", type=float, metavar="X", help="nucleus sampling (default: the checkpoint's)")
    parser.add_argument("--top-k", type=int, metavar="N", help="0 keeps all (default: the checkpoint's)")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")


def _cluster_config(args: argparse.Namespace, model: str) -> ClusterConfig:
    """Attention and experts take turns, so each role gets all cores of a machine that is its own: 71.5 instead of 58.4
    tokens/s over 32 streams (BENCHMARKS.md)."""
    names = {f.name for f in fields(ClusterConfig)} & vars(args).keys() - {"model"}
    given = {name: getattr(args, name) for name in names}
    cores = 1 if args.ray_address else len(os.sched_getaffinity(0))
    for cpus, processes in (
        ("cpus_per_attention_replica", args.attention_replicas),
        ("cpus_per_expert_shard", args.expert_shards),
    ):
        if given[cpus] is None:
            given[cpus] = float(max(1, cores // max(1, processes)))
    if given.get("api_keys_file"):
        given["api_keys_file"] = str(Path(given["api_keys_file"]).resolve())
    return ClusterConfig(model=str(Path(model).resolve()), **given)


def _serve_options(args: argparse.Namespace) -> Any:
    from cluster.runtime.grpc_front import GrpcFront
    from cluster.runtime.launch import ServeOptions

    given = {f.name: getattr(args, f.name) for f in fields(GrpcFront) if hasattr(args, f.name)}
    return ServeOptions(
        grpc_port=args.grpc_port,
        ray_address=args.ray_address,
        haproxy=args.proxy == "haproxy",
        front=GrpcFront(**given),
    )


@contextmanager
def _served(args: argparse.Namespace, model: str) -> Iterator[Any]:
    """A served cluster, with its start and its stop shown; SIGTERM, or a closed terminal, ends it like Ctrl-C."""
    from cluster.console import LoadProgress  # torch and ray load with these: not for --help
    from cluster.runtime.launch import ServedCluster

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    config = _cluster_config(args, model)
    with LoadProgress("starting Ray and Ray Serve") as progress:
        cluster = ServedCluster(config, _serve_options(args), progress.update)
    try:
        yield cluster
    finally:
        for number in ENDS:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
        with suppress(OSError):  # the terminal was closed
            print("stopping: waiting for running requests …", flush=True)
        cluster.close()
        with suppress(OSError):
            print("stopped", flush=True)


def _serve(args: argparse.Namespace) -> int:
    from cluster.console import print_cluster

    with _served(args, args.model) as cluster:
        print_cluster(cluster)
        _wait_for_interrupt("Ctrl-C drains and stops.")
    return 0


def _demo(args: argparse.Namespace) -> int:
    from cluster.checkpoint.demo import write_demo_checkpoint
    from cluster.console import print_cluster, print_metrics, print_placement
    from cluster.serving.client import Client
    from cluster.types import ChatMessage, SamplingParams

    folder = Path(tempfile.mkdtemp(prefix="moe-demo-"))
    try:
        model = folder / "demo-moe"
        write_demo_checkpoint(model, seed=0)
        print("made a demo checkpoint: qwen2_moe, 64 routed experts in 4 layers, random weights (so: random answers)")
        with _served(args, str(model)) as cluster:
            status = cluster.status()
            print_cluster(cluster)
            print_placement(status)
            print(f"\nuser:      {DEMO_QUESTION}\nassistant: ", end="", flush=True)
            with Client(f"127.0.0.1:{cluster.grpc_port}") as client:
                params = SamplingParams(seed=0, max_tokens=48)
                _print_stream(client.stream([ChatMessage(role="user", content=DEMO_QUESTION)], params))
            with urlopen(status.metrics_addresses[0], timeout=10) as response:
                print_metrics(response.read().decode(), DEMO_METRICS)
            if args.keep:
                address = f"127.0.0.1:{cluster.grpc_port}"
                _wait_for_interrupt(f"running; try: moe-cluster chat --address {address}\nCtrl-C stops.")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _ray_env(args: argparse.Namespace) -> int:
    from cluster.runtime.haproxy import ray_environment

    for name, value in ray_environment().items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def _generate(args: argparse.Namespace) -> int:
    with connect.connect(args) as client:
        _print_stream(client.stream(args.prompt, _sampling(args)))
    return 0


def _chat(args: argparse.Namespace) -> int:
    from cluster.types import ChatMessage

    history = [ChatMessage(role="system", content=args.system)] if args.system else []
    with connect.connect(args) as client:
        if not client.is_serving(timeout_s=10.0):
            print(
                f"moe-cluster: no server is ready at {args.address}: start one with `moe-cluster serve MODEL_DIR`",
                file=sys.stderr,
            )
            return 1
        while True:
            try:
                line = input("you> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return 0
            if not line:
                return 0
            history.append(ChatMessage(role="user", content=line))
            answer = _print_stream(client.stream(history, _sampling(args)))
            history.append(ChatMessage(role="assistant", content=answer))


def _running(args: argparse.Namespace) -> Any:
    """The running cluster that the arguments mean."""
    address = args.ray_address or find_address()
    from cluster.runtime.operate import RunningCluster  # ray loads with it and reads the environment

    return RunningCluster(address)


def _chaos(args: argparse.Namespace) -> int:
    chaos.check(args)
    with _running(args) as cluster:
        return chaos.run(args, cluster)


def _status(args: argparse.Namespace) -> int:
    from cluster.console import print_status

    with _running(args) as cluster:
        print_status(cluster.status())
    return 0


def _top(args: argparse.Namespace) -> int:
    from cluster.console import watch_status

    if args.interval <= 0:
        raise SetupError(f"--interval is {args.interval:g}, above 0 is needed")
    with _running(args) as cluster, suppress(KeyboardInterrupt):
        watch_status(cluster.status, args.interval)
    return 0


def _rebalance(args: argparse.Namespace) -> int:
    with _running(args) as cluster, _work_shown(cluster):
        done = cluster.rebalance()
    print(done)
    return 0


def _roll(args: argparse.Namespace) -> int:
    with _running(args) as cluster, _work_shown(cluster):
        done = cluster.roll()
    print(done)
    return 0


def _scale(args: argparse.Namespace) -> int:
    if args.expert_shards is None and args.attention_replicas is None:
        raise SetupError("nothing to change: give --expert-shards, --attention-replicas or both")
    with _running(args) as cluster:
        if args.expert_shards is not None:
            with _work_shown(cluster):
                done = cluster.scale_experts(args.expert_shards)
            print(done)
        if args.attention_replicas is not None:
            print(cluster.scale_attention(args.attention_replicas))
            while (running := cluster.attention_replicas()) != args.attention_replicas:
                print(f"\r{running} of {args.attention_replicas} run", end="", file=sys.stderr, flush=True)
                time.sleep(0.5)  # Serve starts and drains them in its own time
            print(f"\r{running} attention replicas run", file=sys.stderr)
    return 0


@contextmanager
def _work_shown(cluster: Any) -> Iterator[None]:
    """While a change goes on, what the controller says of it."""
    done = threading.Event()

    def show() -> None:
        last = ""
        while not done.wait(0.5):
            try:
                work = cluster.status().work
            except ClusterError:
                continue
            if work and work != last:
                print(work, file=sys.stderr, flush=True)
            last = work

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _plan(args: argparse.Namespace) -> int:
    from cluster.checkpoint.names import dense_bytes
    from cluster.checkpoint.reader import CheckpointReader
    from cluster.config import DTYPE_BYTES
    from cluster.console import print_plan
    from cluster.experts.placement import plan_evenly

    reader = CheckpointReader(args.model)
    reader.check_names()
    config = reader.config
    dtype = config.dtype if args.dtype == "auto" else args.dtype
    if dtype not in DTYPE_BYTES:
        raise SetupError(f"dtype is {dtype!r}, one of auto, {', '.join(DTYPE_BYTES)} is needed")
    plan = plan_evenly(config.sparse_layers, config.num_experts, args.shards)
    print_plan(plan, dtype, config.expert_bytes(dtype), dense_bytes(config, dtype), config.kv_bytes_per_token(dtype))
    return 0


def _keys_new(args: argparse.Namespace) -> int:
    from cluster.serving.api_keys import new_key

    key, line = new_key(args.name)
    print(f"the key, for its user; it is kept nowhere:\n{key}\nits line for the file of keys:", file=sys.stderr)
    print(line)
    return 0


def _sampling(args: argparse.Namespace) -> Any:
    from cluster.types import SamplingParams

    return SamplingParams(
        max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, seed=args.seed
    )


def _print_stream(pieces: Iterator[Any]) -> str:
    """Prints an answer while it comes; returns its text."""
    texts = []
    for piece in pieces:
        texts.append(piece.text)
        print(piece.text, end="", flush=True)
    print()
    return "".join(texts)


def _wait_for_interrupt(invitation: str) -> None:
    """Prints the invitation and returns on Ctrl-C, SIGTERM or a closed terminal, however soon it comes.

    A KeyboardInterrupt would be lost in whatever callback it happened to be raised in: the signal wakes a pipe instead.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in ENDS:
        signal.signal(number, lambda *_: None)
    print(f"\n{invitation}", flush=True)
    while os.read(reader, 1)[0] not in ENDS:
        pass  # another signal that something handles
    signal.set_wakeup_fd(-1)
    os.close(reader)
    os.close(writer)
    print()


if __name__ == "__main__":
    sys.exit(main())
