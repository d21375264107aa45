"""Imported by every Python of a rollout's Ray (as `sitecustomize`): a process keeps the version that it started with
when the link to it is turned to another one."""

import os
import sys

if __name__ == "sitecustomize":
    sys.path[:] = [os.path.realpath(folder) if folder else folder for folder in sys.path]
