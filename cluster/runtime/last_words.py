"""Finds why a process could not start, in the texts of Ray and Serve: tracebacks in tracebacks."""

import re
from collections.abc import Callable
from contextlib import suppress

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from cluster.errors import SetupError
from cluster.status import ClusterStatus

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


def why_not_started(error: Exception, application: str, status: Callable[[], ClusterStatus]) -> str:
    """Returns in one line why an application did not start: from HAProxy, the controller, a deployment's process or
    Serve.

    error: raised by `serve.run`.  status: asks the controller.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    alert = next((line for line in lines if "[ALERT]" in line), "")  # HAProxy's
    if alert:
        return alert
    with suppress(SetupError, ray.exceptions.RayError):
        if failure := status().failure:
            return failure
    texts = [str(error)]
    with suppress(RayServeException, ray.exceptions.RayError):
        found = serve.status().applications.get(application)
        texts += [] if found is None else [deployment.message for deployment in found.deployments.values()]
    reason = next((words for words in map(last_words, texts) if words), "")
    return reason or (lines[-1] if lines else repr(error))


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
