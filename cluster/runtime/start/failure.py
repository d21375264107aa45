"""Finds why an application did not start, wherever that is said."""

from collections.abc import Callable
from contextlib import suppress

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from cluster.errors import SetupError
from cluster.runtime.last_words import last_words
from cluster.status import ClusterStatus


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
