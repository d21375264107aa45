"""These tests use tools of the neighbouring folders."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / name) for name in ("unit", "served")]
