"""Hides paths, addresses and tokens in texts that strangers read. Knows no cluster.

Reasons of faults come from other processes and libraries, so their form is not known: all that may be one goes.
"""

import re

MAX_TEXT_CHARS = 240
MAX_READ_CHARS = 4_000  # of a longer text the rest is not looked at, and not shown
HIDDEN = "…"

_PART = r"[\w.@+~=%,#-]+"
_ZONES = "internal|local|localdomain|lan|home|corp|svc|com|net|org|io|dev|cloud"
# Each run of characters is tried once, from its beginning: a long text costs no more than its length.
_SECRETS = re.compile(
    "|".join(
        (
            r"\w+://[^\s'\"<>)\]]+",
            r"""(?<=['"])(?:~|\.{1,2})?/[^'"\n]+(?=['"])""",  # with spaces in it
            rf"(?<![\w./~])(?:~\w*|\.{{1,2}})?(?:/{_PART})+/?",
            rf"(?<![\w./@+~=%,#-]){_PART}(?:/{_PART}){{2,}}/?",
            rf"(?<![\w./@+~=%,#-]){_PART}/(?:[\w@+~=%,#-]*\.)+[A-Za-z]\w{{1,11}}\b",
            r"(?i:\bbearer\s+)[^\s'\",;]+",
            r"""(?i:(?<!\w)\w*(?:token|key|secret|password|authorization)['"]?\s?[=:]\s?)['"]?[^\s'",;]+['"]?""",
            r"(?<![\w-])(?:hf_|sk-|ghp_|eyJ)[\w-]{8,}(?:\.[\w-]+)*",
            r"(?<![\w-])(?=[A-Za-z_-]*\d)(?=[\d_-]*[A-Za-z])[\w-]{24,}",  # also the ids of Ray's nodes and actors
            r"(?<![\w.])\[?(?:[0-9A-Fa-f]{0,4}:){2,7}(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4})(?:%\w+)?\]?(?::\d+)?(?!\w)",
            r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?:[:/]\d+)?(?!\w)",
            r"(?<![\w.-])[\w-]+(?:\.[\w-]+)*:\d{2,5}(?!\w)",
            r"(?<![\w.-])ip-\d+(?:-\d+){3}[\w.-]*",
            rf"(?<![\w.-])[\w-]+(?:\.[\w-]+)*\.(?:{_ZONES})(?![\w])",
        )
    )
)


def public(text: str) -> str:
    """The text in one line, for any client of the server."""
    return _SECRETS.sub(HIDDEN, " ".join(text[:MAX_READ_CHARS].split()))[:MAX_TEXT_CHARS]
