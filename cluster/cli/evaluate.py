"""The command that measures a model's answers: eval."""

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli import terminal
from cluster.cli.arguments import Commands, add_command, add_options, byte_size
from cluster.client import options
from cluster.client.files import read_whole
from cluster.config.kv_cache import AUTO
from cluster.config.quantization import PLAIN
from cluster.errors import SetupError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cluster.config import EngineConfig, ModelConfig
    from cluster.perplexity import Perplexity, Windows

SEQUENCES = 8  # windows at a time, offline; through a server half as many calls at a time
MAX_TEXT_BYTES = 256 << 20  # all of which is read before anything is computed
TOKENS = 16384  # of all windows at a time, offline, unless one has more: their keys and values take memory
ROUNDINGS = {"quantization": PLAIN, "expert_quantization": None, "kv_cache_dtype": AUTO}  # none, by the fields' names
OFFLINE_OPTIONS = ("dtype", "device", "kv_cache_bytes", "rope_scaling", *ROUNDINGS)


def add_commands(commands: Commands) -> None:
    command = add_command(
        commands, "eval", _eval, "measure a model's perplexity on a text, offline or through a server"
    )
    command.add_argument(
        "model", nargs="?", metavar="MODEL", help="directory of a checkpoint, or its name on the hub, computed here"
    )
    text = command.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", type=Path, metavar="FILE", help="a text in UTF-8; - reads standard input")
    text.add_argument(
        "--token-ids", type=Path, metavar="FILE", help="token ids, with spaces, commas or lines between, or a JSON list"
    )
    command.add_argument(
        "--context", type=int, metavar="N", help="tokens of a window (default: the model's context, 2048 at most)"
    )
    command.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens from a window to the next one; the rest of each is context alone (default: 512, or the context)",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--dtype", help="offline: float32, bfloat16, float16 or auto (default: the checkpoint's)")
    command.add_argument("--device", help="offline: cpu, cuda or auto (default: auto)")
    command.add_argument(
        "--kv-cache-bytes", type=byte_size, metavar="BYTES", help="offline (default: what the windows need)"
    )
    add_options(command, "rope_scaling", *ROUNDINGS)
    command.set_defaults(**dict.fromkeys(ROUNDINGS))
    command.add_argument(
        "--compare",
        action="store_true",
        help="offline, with --quantization, --expert-quantization or --kv-cache-dtype: measure without them too, "
        "before, and print the difference",
    )
    options.add_arguments(command, address=None)


def _eval(args: argparse.Namespace) -> int:
    if (args.model is None) == (args.address is None):
        raise SetupError("give a model, or --address of a running server: one of the two")
    given = [name for name in OFFLINE_OPTIONS if getattr(args, name) is not None]
    if given and args.address is not None:
        raise SetupError(f"--{given[0].replace('_', '-')} is of an offline model: the server at --address has its own")
    needless = [name for name in options.SECURITY if getattr(args, name)]
    if needless and args.address is None:
        raise SetupError(
            f"--{needless[0].replace('_', '-')} is of a running server, and {args.model} is computed here: leave it "
            "out, or give --address in place of a model"
        )
    if args.compare and all(getattr(args, name) in (None, PLAIN, AUTO) for name in ROUNDINGS):
        raise SetupError(
            "--compare is of rounded numbers: give --quantization, --expert-quantization or --kv-cache-dtype, offline"
        )
    results = _offline(args) if args.address is None else [_served(args)]
    if args.json:
        print(json.dumps(_report(results), indent=2))
        return 0
    for name, result in zip(("unquantized: ", "") if args.compare else ("",), results, strict=True):
        print(
            f"{name}perplexity {result.perplexity:.4f} ({result.token_perplexity:.4f} with each token once): "
            f"{result.num_tokens:,} tokens in {result.num_windows:,} windows of {result.context:,}, stride "
            f"{result.stride:,}"
        )
    if args.compare:
        difference = results[1].perplexity - results[0].perplexity
        print(f"difference {difference:+.4f} ({difference / results[0].perplexity:+.2%})")
    return 0


def _report(results: "Sequence[Perplexity]") -> dict[str, object]:
    """results: the one that was asked for is last."""
    report: dict[str, object] = asdict(results[-1])
    if len(results) > 1:
        report["unquantized"] = asdict(results[0])
        report["difference"] = results[1].perplexity - results[0].perplexity
    return report


def _offline(args: argparse.Namespace) -> "list[Perplexity]":
    """Of numbers that nobody rounds, if they are to be compared, and of those that were asked for."""
    from cluster.checkpoint.info import max_model_len
    from cluster.checkpoint.opening import open_checkpoint
    from cluster.perplexity import Windows
    from cluster.serving.text.tokenizer import Tokenizer

    checkpoint = open_checkpoint(args.model, args.rope_scaling)
    checkpoint.config.head.check_serves("token_logprobs")
    windows = Windows.of(args.context, args.stride, max_model_len(checkpoint.config, _engine(args)))
    token_ids = _given_ids(args)
    if token_ids is None:
        token_ids = Tokenizer(checkpoint.model_dir).encode(_text(args.text))
    asked = {name: plain if getattr(args, name) is None else getattr(args, name) for name, plain in ROUNDINGS.items()}
    forms = [ROUNDINGS, asked] if args.compare else [asked]
    return [_of_form(args, checkpoint.config, windows, token_ids, form) for form in forms]


def _engine(args: argparse.Namespace, **form: Any) -> "EngineConfig":
    from cluster.config import EngineConfig

    device = "auto" if args.device is None else args.device
    return EngineConfig(dtype="auto" if args.dtype is None else args.dtype, device=device, **form)


def _of_form(
    args: argparse.Namespace,
    config: "ModelConfig",
    windows: "Windows",
    token_ids: Sequence[int],
    form: Mapping[str, Any],
) -> "Perplexity":
    """form: as ROUNDINGS."""
    from cluster.checkpoint.info import resolve_dtype
    from cluster.console import CountProgress
    from cluster.llm import LLM
    from cluster.perplexity import perplexity

    engine, batch = _engine(args, **form), max(1, min(SEQUENCES, TOKENS // windows.context))
    blocks = -(-windows.context // engine.block_size) + 1
    token_bytes = config.kv_bytes_per_token(engine.cache_dtype(resolve_dtype(engine.dtype, config)))
    needed = token_bytes * engine.block_size * blocks
    llm = LLM(
        args.model,
        skip_tokenizer=True,
        dtype=engine.dtype,
        device=engine.device,
        max_model_len=windows.context,
        kv_cache_bytes=needed * (batch + 1) if args.kv_cache_bytes is None else args.kv_cache_bytes,
        rope_scaling=args.rope_scaling,
        **form,
        enable_prefix_caching=False,
    )
    with llm, CountProgress("tokens", "tokens") as bar:

        def score(parts: Sequence[Sequence[int]]) -> "list[NDArray[np.float32]]":
            return [found.logprobs.numpy() for found in llm.prompt_logprobs(list(parts))]

        return perplexity(token_ids, windows, score, batch=batch, progress=bar.update)


def _served(args: argparse.Namespace) -> "Perplexity":
    import numpy as np

    from cluster.client.long_text import tokenize_in_parts
    from cluster.client.patience import patient
    from cluster.console import CountProgress
    from cluster.perplexity import Windows, perplexity

    token_ids = _given_ids(args)
    with (
        options.connect(args) as client,
        ThreadPoolExecutor(SEQUENCES // 2) as threads,
        CountProgress("tokens", "tokens") as bar,
    ):
        windows = Windows.of(args.context, args.stride, client.model_info().max_model_len)
        one = patient(client.score)
        if token_ids is None:
            token_ids = tokenize_in_parts(_text(args.text), patient(client.tokenize))

        def score(parts: Sequence[Sequence[int]]) -> "list[NDArray[np.float32]]":
            return [np.array(answer.logprobs, dtype=np.float32) for answer in threads.map(one, parts)]

        return perplexity(token_ids, windows, score, batch=SEQUENCES // 2, progress=bar.update)


def _text(path: Path) -> str:
    """Raises SetupError for a file that cannot be read, or that is no text or empty."""
    raw = read_whole(path, MAX_TEXT_BYTES)
    text = terminal.utf8(raw.decode("utf-8", "surrogateescape").removeprefix("\ufeff"), f"--text {path}")
    if not text.strip():
        raise SetupError(f"--text {path} is empty: there is nothing to measure")
    return text


def _given_ids(args: argparse.Namespace) -> list[int] | None:
    """Raises SetupError for a file that cannot be read, or that has anything beside ids."""
    if args.token_ids is None:
        return None
    words = (
        read_whole(args.token_ids, MAX_TEXT_BYTES)
        .decode("utf-8", "replace")
        .strip()
        .removeprefix("[")
        .removesuffix("]")
    )
    found = words.replace(",", " ").split()
    for word in found:
        if not (word.isascii() and word.isdigit() and len(word) < 12):
            raise SetupError(f"--token-ids {args.token_ids}: {word[:40]!r} is no token id, whole numbers are needed")
    return [int(word) for word in found]
