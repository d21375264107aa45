"""Draws which experts computed, from a Prometheus exposition."""

import re
from collections.abc import Mapping

LEVELS = " ▁▂▃▄▅▆▇█"
_LINE = re.compile(r"moecluster_expert_tokens_total\{(?P<labels>[^}]*)\} (?P<count>\S+)")
_LABEL = re.compile(r'(\w+)="(\d+)"')

ExpertCounts = dict[tuple[int, int], float]  # (layer, expert) -> tokens


def expert_counts(exposition: str) -> ExpertCounts:
    """The tokens of each expert since the start; experts that had none may be absent."""
    counts: ExpertCounts = {}
    for found in _LINE.finditer(exposition):
        labels = {name: int(value) for name, value in _LABEL.findall(found["labels"])}
        key = labels["layer_id"], labels["expert_id"]
        counts[key] = counts.get(key, 0.0) + float(found["count"])
    return counts


def bar(share: float) -> str:
    """One character, as high as a share of 1; what is not zero is seen."""
    return LEVELS[max(share > 0, min(len(LEVELS) - 1, round(share * (len(LEVELS) - 1))))]


def expert_lines(before: Mapping[tuple[int, int], float], after: Mapping[tuple[int, int], float]) -> list[str]:
    """A line for each sparse layer and a character for each expert, by the tokens between two readings."""
    tokens = {key: count - before.get(key, 0.0) for key, count in after.items()}
    lines = []
    for layer_id in sorted({layer for layer, _ in tokens}):
        row = {expert: count for (layer, expert), count in tokens.items() if layer == layer_id}
        busiest = max(row.values()) or 1.0
        bars = "".join(bar(row.get(expert, 0.0) / busiest) for expert in range(max(row) + 1))
        lines.append(f"{layer_id:3d} {bars}")
    return lines
