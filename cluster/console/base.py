"""The console that all drawings print to, and short forms of numbers and ids."""

from cluster.drawing import OutputConsole as OutputConsole


def ranges(ids: tuple[int, ...]) -> str:
    """Shortens ids: 0-8, 12."""
    parts: list[list[int]] = []
    for i in sorted(ids):
        if parts and parts[-1][1] == i - 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def size(num_bytes: float) -> str:
    """1536 -> 1.5 KB; powers of 1000, as disks and GPUs are sold."""
    unit = 0
    while num_bytes >= 1000 and unit < 4:
        num_bytes, unit = num_bytes / 1000, unit + 1
    return f"{num_bytes:.4g} {('B', 'KB', 'MB', 'GB', 'TB')[unit]}"


def count(number: float) -> str:
    """14315784192 -> 14.3 B; K, M and B are powers of 1000, with the digits that models' names have."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number:g}"
