"""One run of the benchmark: checkpoint, systems one after another, report. Progress goes to stderr."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cluster.bench.checkpoint import describe, made_with_progress, read_config, stored_checkpoint
from cluster.bench.machine import this_machine
from cluster.bench.plot import check_plot, plot_report
from cluster.bench.report import Report, to_json, to_markdown
from cluster.bench.sampling import SAMPLINGS, find_samplings
from cluster.bench.spec import SystemSpec
from cluster.bench.stored_forms import STORED
from cluster.bench.systems import check_comparison, check_shards
from cluster.bench.throughput import Workload, measure_in_turns
from cluster.bench.worker import RemoteSystem, SystemResult, run_system
from cluster.checkpoint.made.published import SHAPES
from cluster.checkpoint.model_files import complete_directory
from cluster.config import ModelConfig
from cluster.config.quantization import PLAIN
from cluster.config.speculation import with_model
from cluster.drawing import bars
from cluster.errors import ClusterError, SetupError

REST_S = 0.5  # between two systems' turns: OpenMP threads spin for up to 0.2 s after their work

StartSystem = Callable[[SystemSpec, ModelConfig, Workload], RemoteSystem]
RunSystem = Callable[[SystemSpec, ModelConfig, Workload, Callable[[str], None]], SystemResult]


def measure_all(
    args: argparse.Namespace,
    run_one: RunSystem = run_system,
    start_one: StartSystem = RemoteSystem,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Carries out `moe-cluster bench throughput` and `latency`; see `command.run`.

    run_one: measures one system.  start_one: loads one, for --turns, which are timed by `clock`.
    """
    for kind in args.compare:
        check_comparison(kind, _python(args, kind))
    biased = [name for name in args.sampling if name in SAMPLINGS and SAMPLINGS[name].num_words]
    if args.compare and biased:
        raise SetupError(f"--sampling {biased[0]} needs a logit_bias, which the systems of --compare are not given")
    if args.plot:
        check_plot()
    draft = _draft(args)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with bars(*columns) as progress:
        if args.model_dir is not None:
            model_dir = complete_directory(args.model_dir)  # other engines know no names
        else:
            model_dir = made_with_progress(args.shapes, args.layers, args.checkpoint_dir, progress)
        config = read_config(model_dir)
        workload = replace(_fit(draft, args.shards, config), samplings=find_samplings(args.sampling, model_dir))
        dtype = config.dtype if args.dtype == "auto" else args.dtype
        drafts = [_with_made_model(one, args, progress) for one in args.speculative_config or (None,)]
        specs = _specs(args, model_dir, dtype, config, drafts=drafts)
        if not config.num_experts and {"stream", "ray"} & set(args.transports):
            progress.console.print("the model is dense, it has no shards to carry rows to: stream and ray are left out")
        if args.turns:
            results, failures = _take_turns(specs, config, workload, progress, start_one, clock=clock)
        else:
            results, failures = _run_systems(specs, config, workload, progress, run_one)
    report = Report(
        machine=this_machine(),
        checkpoint=describe(config, dtype),
        workload=workload,
        reference=specs[0].name,
        results=tuple(results),
        failures=tuple(failures),
    )
    print(to_markdown(report, latency=args.bench == "latency"), end="")
    if args.plot:
        plot_report(report, args.plot)
    if args.json:
        args.json.write_text(to_json(report))
    return 1 if failures else 0


def _with_made_model(
    given: Mapping[str, Any] | None, args: argparse.Namespace, progress: Progress
) -> Mapping[str, Any] | None:
    """A `speculative_config` whose model, if it is one of SHAPES, is made with random weights."""
    return with_model(
        given,
        lambda name: str(made_with_progress(name, None, args.checkpoint_dir, progress)) if name in SHAPES else name,
    )


def _specs(
    args: argparse.Namespace,
    model_dir: Path,
    dtype: str,
    config: ModelConfig,
    *,
    drafts: Sequence[Mapping[str, Any] | None],
) -> list[SystemSpec]:
    """The systems to measure; the first is the reference. A dense model has no shards to carry rows to."""
    specs = [
        SystemSpec(
            kind=kind,
            model_dir=stored_checkpoint(model_dir, name, args.checkpoint_dir) if name in STORED else model_dir,
            dtype=dtype,
            num_shards=args.shards,
            python=_python(args, kind),
            variables=tuple(args.vllm_env) if kind == "vllm" else (),
            quantization=name,
            speculative_config=guesses,
            num_adapters=num_adapters,
        )
        for kind in (*args.compare, *args.transports)
        for name in _forms(args, kind)
        for guesses in (drafts if kind in args.transports else (None,))
        for num_adapters in (args.adapters if kind in args.transports else (0,))
    ]
    return [spec for spec in specs if config.num_experts or not spec.split] or [replace(specs[0], kind="local")]


def _forms(args: argparse.Namespace, kind: str) -> tuple[str, ...]:
    """As of `SystemSpec.quantization`."""
    if kind == "llama.cpp":
        return tuple(PLAIN if name == "bf16" else name for name in args.llama_weights)
    return tuple(args.quantization) if kind in args.transports else (PLAIN,)


def _python(args: argparse.Namespace, kind: str) -> str:
    return str({"vllm": args.vllm_python, "llama.cpp": args.llama_python}.get(kind, ""))


def _draft(args: argparse.Namespace) -> Workload:
    """The workload without the vocabulary: wrong arguments are refused before gigabytes are written."""
    return Workload(
        batches=args.batch,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        repeats=args.repeat,
        vocab_size=1,
    )


def _fit(draft: Workload, num_shards: int, config: ModelConfig) -> Workload:
    """Fills in the vocabulary. Raises SetupError for a workload that this checkpoint does not allow."""
    check_shards(num_shards, config)
    num_tokens = draft.prompt_tokens + draft.output_tokens
    if num_tokens > config.context_length:
        raise SetupError(
            f"--prompt-tokens and --output-tokens make {num_tokens} tokens, the checkpoint's context is "
            f"{config.context_length}"
        )
    return replace(draft, vocab_size=config.vocab_size)


def _run_systems(
    specs: Sequence[SystemSpec],
    config: ModelConfig,
    workload: Workload,
    progress: Progress,
    run_one: RunSystem,
) -> tuple[list[SystemResult], list[str]]:
    """Runs one after another: two may not fit into memory. The failure of one does not stop the others."""
    results, failures = [], []
    for spec in specs:
        task = progress.add_task(f"{spec.name}: loading", total=workload.num_runs + 1)
        try:
            results.append(run_one(spec, config, workload, _advance(progress, task, spec.name)))
        except ClusterError as error:
            failures.append(str(error))
        progress.update(task, description=spec.name)
    return results, failures


def _take_turns(
    specs: Sequence[SystemSpec],
    config: ModelConfig,
    workload: Workload,
    progress: Progress,
    start_one: StartSystem,
    *,
    clock: Callable[[], float],
) -> tuple[list[SystemResult], list[str]]:
    """Loads all at once; one at a time works."""
    systems: list[RemoteSystem] = []
    failures = []
    try:
        for spec in specs:
            task = progress.add_task(f"{spec.name}: loading", total=1)
            try:
                systems.append(start_one(spec, config, workload))
            except ClusterError as error:
                failures.append(f"{spec.name}: {error}")
            progress.update(task, completed=1, description=f"{spec.name}: loaded")
        task = progress.add_task("taking turns", total=workload.num_runs * len(systems))
        found = measure_in_turns(
            systems,
            workload,
            clock,
            lambda system, run: progress.update(task, advance=1, description=run.name),
            lambda: time.sleep(REST_S),
        )
    finally:
        for system in systems:
            system.close()
    results = []
    for place, system in enumerate(systems):
        points = found[place]
        if isinstance(points, ClusterError):
            failures.append(f"{system.name}: {points}")
        else:
            results.append(SystemResult(name=system.name, detail=system.detail, load_s=system.load_s, points=points))
    return results, failures


def _advance(progress: Progress, task: TaskID, name: str) -> Callable[[str], None]:
    return lambda what: progress.update(task, advance=1, description=f"{name}: {what}")
