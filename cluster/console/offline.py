"""Draws for commands without a cluster: a plan, a machine's state, an excerpt of metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from cluster.checkpoint.sizes import ModelSizes
from cluster.config import ModelConfig
from cluster.console.base import OutputConsole, count, ranges, size
from cluster.doctor import Finding
from cluster.experts.placement import PlacementPlan

NARROW = 60  # columns; a terminal with fewer has no room for three of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A model as a cluster would hold it.

    context_tokens: of prompt and answer together at most.
    download_bytes: of an attention replica, then of each shard; empty for a directory.
    adapter_bytes: of each LoRA adapter, by name: in every attention replica, and in all shards together.
    draft: of the model that drafts tokens for it, if there is one.
    ranks: of the parts of an attention replica's processes, where several share the model.
    """

    config: ModelConfig
    placement: PlacementPlan
    sizes: ModelSizes
    context_tokens: int
    download_bytes: Sequence[int]
    has_tokenizer: bool
    adapter_bytes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    draft: ModelSizes | None = None
    ranks: Sequence[ModelSizes] = ()


def print_plan(plan: Plan) -> None:
    """Prints a model's parameters, which expert would go where, and the bytes of each process."""
    console, config, sizes = OutputConsole(), plan.config, plan.sizes
    active = f", {count(sizes.num_active_parameters)} of them active for a token" if config.moe is not None else ""
    head = "" if config.head.generates else f" with {config.head}"
    console.print(
        f"{config.model_type}{head}, {count(sizes.num_parameters)} parameters ({sizes.num_parameters:,}){active}; "
        f"{config.num_hidden_layers} layers, context {plan.context_tokens:,} tokens",
        highlight=False,
    )
    console.print(_table(plan))
    slides = "".join(f" ({size(each)} of it for the last {window:,} tokens alone)" for window, each in sizes.sliding)
    rounded = f" in {sizes.cache_dtype}" if sizes.cache_dtype != sizes.dtype else ""
    of_rank = max((part.kv_bytes_per_token for part in plan.ranks), default=0)
    divided = f", at most {size(of_rank)} of it in a rank," if of_rank else ","
    console.print(
        f"KV cache: {size(sizes.kv_bytes_per_token)} a token{rounded}{slides}{divided} for each attention replica "
        "beside its weights, of 0.9 of the memory that is free on a GPU then, or 0.5 of a machine's (--kv-cache-bytes, "
        "--memory-utilization)",
        highlight=False,
    )
    if plan.draft is not None:
        console.print(
            f"draft model: {count(plan.draft.num_parameters)} parameters, {size(plan.draft.dense_bytes)} beside the "
            f"weights of each attention replica, and {size(plan.draft.kv_bytes_per_token)} a token of its KV cache's "
            "memory",
            highlight=False,
        )
    if any(plan.download_bytes):
        names = ["an attention replica", *(f"expert shard {i}" for i in range(len(plan.download_bytes) - 1))]
        parts = ", ".join(f"{size(of_one)} by {name}" for of_one, name in zip(plan.download_bytes, names, strict=True))
        console.print(f"to be downloaded, each on a node of its own: {parts}", highlight=False)
    if not plan.has_tokenizer:
        console.print(
            "no tokenizer (tokenizer.json, or vocab.json with merges.txt): put it there, or serve token ids alone "
            "with --skip-tokenizer",
            highlight=False,
        )


def _table(plan: Plan) -> Table:
    table = Table(
        "process",
        "experts of each sparse layer",
        "experts",
        "weights",
        title=f"{len(plan.placement.layer_ids) or 'no'} sparse layers, {plan.sizes.dtype}",
    )
    for rank, part in enumerate(plan.ranks):
        table.add_row(f"attention replica, rank {rank}", "dense weights", "", size(part.dense_bytes))
    if not plan.ranks:
        table.add_row("attention replica", "dense weights", "", size(plan.sizes.dense_bytes))
    for name, (of_replica, _) in plan.adapter_bytes.items():
        table.add_row(
            f"attention replica{', all ranks' if plan.ranks else ''}", f"adapter {name}", "", size(of_replica)
        )
    for shard_id, layers in enumerate(plan.placement.slices):
        num_experts = _num_experts(layers)
        shown = ranges(next(iter(layers.values()), ()))
        table.add_row(f"expert shard {shard_id}", shown, str(num_experts), size(num_experts * plan.sizes.expert_bytes))
    for name, (_, of_shards) in plan.adapter_bytes.items():
        if of_shards:
            table.add_row("all expert shards", f"adapter {name}", "", size(of_shards))
    return table


def describe_plan(plan: Plan) -> dict[str, Any]:
    """The same for machines to read. Bytes are exact; a shard's experts are of all its layers together."""
    config, sizes = plan.config, plan.sizes
    shards = [_num_experts(layers) for layers in plan.placement.slices]
    return {
        "model_type": config.model_type,
        "head": config.head.kind,
        "labels": list(config.head.labels),
        "dtype": sizes.dtype,
        "context_tokens": plan.context_tokens,
        "has_tokenizer": plan.has_tokenizer,
        "parameters": sizes.num_parameters,
        "active_parameters": sizes.num_active_parameters,
        "attention_replica_bytes": sizes.dense_bytes,
        "adapters": [
            {"name": name, "attention_replica_bytes": of_replica, "expert_shards_bytes": of_shards}
            for name, (of_replica, of_shards) in plan.adapter_bytes.items()
        ],
        "kv_cache_dtype": sizes.cache_dtype,
        "kv_bytes_per_token": sizes.kv_bytes_per_token,
        "sliding_windows": [{"tokens": window, "kv_bytes_per_token": each} for window, each in sizes.sliding],
        "expert_shards": [{"experts": number, "bytes": number * sizes.expert_bytes} for number in shards],
        "download_bytes": list(plan.download_bytes),
        "ranks": [{"bytes": part.dense_bytes, "kv_bytes_per_token": part.kv_bytes_per_token} for part in plan.ranks],
        "draft_model": plan.draft
        and {
            "parameters": plan.draft.num_parameters,
            "bytes": plan.draft.dense_bytes,
            "kv_bytes_per_token": plan.draft.kv_bytes_per_token,
        },
    }


def _num_experts(layers: Mapping[int, tuple[int, ...]]) -> int:
    return sum(len(ids) for ids in layers.values())


def print_findings(findings: Sequence[Finding]) -> None:
    """Prints a machine's and an installation's state; an advice stands below its line."""
    console = OutputConsole()
    if console.width < NARROW:
        for finding in findings:
            console.print(Text(str(finding)))
        console.print(_verdict(findings))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        style = {"missing": "bold red", "look": "yellow", "ok": "green"}[finding.mark]
        advice = f"\n→ {finding.advice}" if finding.advice else ""
        table.add_row(Text(finding.mark, style=style), Text(finding.subject), Text(finding.found + advice))
    console.print(table)
    console.print(_verdict(findings))


def _verdict(findings: Sequence[Finding]) -> Text:
    num_missing = sum(finding.missing for finding in findings)
    return Text(f"{num_missing} missing: nothing can be served" if num_missing else "this machine can serve")


def print_metrics(text: str, names: tuple[str, ...]) -> None:
    """Prints an excerpt of a Prometheus exposition."""
    print("\nmetrics (excerpt):")
    for line in text.splitlines():
        if line.startswith(names):
            print(f"  {line}")
