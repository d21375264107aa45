"""Changes to the HAProxy configuration that Serve writes, each of which must find its place."""

import re


def replaced(config: str, pattern: str, replacement: str, times: int | None = 1) -> str:
    """The configuration with each match of the pattern, line by line, replaced.

    times: the matches that there must be; None: any number. Raises ValueError for another one.
    """
    changed, count = re.subn(pattern, replacement, config, flags=re.MULTILINE)
    if times is not None and count != times:
        raise ValueError(f"this Ray Serve writes an HAProxy configuration that moe-cluster does not know: {pattern!r}")
    return changed
