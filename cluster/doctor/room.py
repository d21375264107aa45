"""The released models that have room in this machine, by the bytes of their weights."""

from collections.abc import Iterator

from cluster.doctor.finding import Finding

# Bytes of all weights in bfloat16: docs/models.md and `moe-cluster plan`.
RELEASED = {"Qwen2.5-0.5B": 0.99e9, "Qwen1.5-MoE-A2.7B": 28.63e9, "Qwen2-57B-A14B": 114.8e9}
SHARE = 0.9  # of the memory: processes, steps and a small cache need the rest


def examine_room(memory_bytes: float, where: str) -> Finding:
    """memory_bytes: that is free for weights.  where: its name."""
    fits = {name: size for name, size in RELEASED.items() if size <= SHARE * memory_bytes}
    lacks = {name: size for name, size in RELEASED.items() if name not in fits}
    found = [f"{', '.join(_sized(fits))} in {where}" if fits else f"none of the released ones in {where}"]
    if lacks:
        found.append(f"no room for {', '.join(_sized(lacks))}: spread it over machines (docs/serving.md)")
    return Finding("models", "; ".join(found))


def _sized(models: dict[str, float]) -> Iterator[str]:
    for name, size in models.items():
        yield f"{name} ({size / 1e9:.3g} GB)"
