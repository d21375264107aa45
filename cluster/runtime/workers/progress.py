"""How far a load of weights is, told to the controller."""

import time
from typing import Any

REPORT_INTERVAL_S = 0.5  # between two reports of a load's progress


class ProgressReport:
    """Tells the controller how far a load is, a few times a second."""

    def __init__(self, controller: Any, name: str, total_bytes: int) -> None:
        self._controller, self._name, self._total = controller, name, total_bytes
        self._loaded, self._last = 0, 0.0

    def __call__(self, num_bytes: int) -> None:
        self._loaded += num_bytes
        now = time.monotonic()
        if now - self._last > REPORT_INTERVAL_S or self._loaded >= self._total:
            self._last = now
            self._controller.report_load.remote(self._name, self._loaded, self._total)
