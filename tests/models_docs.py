"""The tables of docs/models.md. `python tests/models_docs.py` writes them between their marks."""

import sys
from pathlib import Path

from bad_models import BAD_MODELS

from cluster.checkpoint.made.published import PUBLISHED
from cluster.checkpoint.sizes import sizes_of
from cluster.config import read_model_config
from cluster.console.base import count, size

sys.path.insert(0, str(Path(__file__).parent / "parity"))
import matrix

END = "<!-- end -->"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"


def sizes() -> str:
    """A row for each released model: what `moe-cluster plan` prints."""
    lines = [
        "| model | parameters | active | a replica, float32 | a replica, 16 bits | all shards, float32 | all shards, "
        "16 bits | KV cache a token, 16 bits | in 8 bits |",
        "| --- " * 9 + "|",
    ]
    for name, raw in PUBLISHED.items():
        config = read_model_config(raw)
        full, half = (sizes_of(config, dtype) for dtype in ("float32", "bfloat16"))
        num_experts = len(config.sparse_layers) * config.num_experts
        shards = [size(num_experts * s.expert_bytes) if num_experts else "none" for s in (full, half)]
        cells = [
            name, count(full.num_parameters), count(full.num_active_parameters) if num_experts else "all",
            size(full.dense_bytes), size(half.dense_bytes), *shards, f"{half.kv_bytes_per_token:,} B",
            f"{config.kv_bytes_per_token('int8'):,} B",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def refusals() -> str:
    lines = ["| not served | a part of the line |", "| --- | --- |"]
    return "\n".join(lines + [f"| {bad.name} | {bad.message} |" for bad in BAD_MODELS]) + "\n"


TABLES = {"sizes": sizes, "parity": matrix.table, "refusals": refusals}


def with_tables(page: str) -> str:
    for name, make in TABLES.items():
        mark = f"<!-- {name}: made by tests/models_docs.py -->\n"
        before, rest = page.split(mark)
        page = before + mark + make() + END + rest.split(END, 1)[1]
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
