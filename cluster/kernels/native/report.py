"""The line in which a process says which kernels it computes with; `moe-cluster doctor` says more."""

import logging
import os
from functools import cache

from cluster.kernels.native.library import VARIABLE, missing_because, native, shares_threads

log = logging.getLogger(__name__)


@cache
def log_kernels() -> None:
    """Logs the line; once, however often it is called."""
    chosen, because = native(), missing_because()
    if chosen is not None:
        log.info("kernels: native %s%s", chosen.variant, "" if shares_threads() else ", each on one thread")
    elif because and os.environ.get(VARIABLE) != "off":
        log.warning("kernels: torch's alone, native ones are %s; see `moe-cluster doctor`", because)
    else:
        log.info("kernels: torch's alone, by %s=%s", VARIABLE, os.environ.get(VARIABLE, ""))
