"""Finds why a process could not start, in the texts of Ray and Serve: tracebacks in tracebacks. Knows neither."""

import re

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"(?P<module>(?:[A-Za-z_]\w*\.)*)(?P<kind>[A-Z]\w*(?:Error|Exception)): (?P<words>.+)")
_EXIT = re.compile(r".*Worker exit detail: (?P<words>.+)")
_OURS = "cluster.errors."
# These only introduce another error's text, which follows them.
_MESSENGERS = re.compile(
    r"Traceback \(most recent call last\)|Failed to update the deployments|Deploying application .* failed"
    r"|The actor died|attention replica \S+: the engine did not start"
)
MAX_CHARS = 600


def last_words(text: str) -> str:
    """The line of an error's text that tells the reason; "" for none.

    An error of ours comes before all others, as it is made for users; else the innermost one, which a traceback has
    first.
    """
    text = _COLOUR.sub("", text)
    raised = [found for line in text.splitlines() if (found := _RAISED.fullmatch(line.strip()))]
    raised = [found for found in raised if not _MESSENGERS.match(found["words"])]
    ours = [found["words"] for found in raised if found["module"] == _OURS]
    others = [f"{found['kind']}: {found['words']}" for found in raised]
    exits = [found["words"] for line in text.splitlines() if (found := _EXIT.fullmatch(line.strip()))]
    reason = next(iter((*ours, *others, *exits)), "")
    return reason if len(reason) <= MAX_CHARS else f"{reason[:MAX_CHARS]} …"
