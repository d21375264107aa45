"""Two processes run the tests, by pytest-xdist: tests wait half of their time, mostly for processes of Ray.

A process takes a file at a time, and one takes all files whose tests share a Ray. (xdist has groups by marks, which
pytest 9.2 breaks.) Single files, and all with `-n0`, are run by the process that is started. Three processes, with a
Ray each for the served application and for the rest, were no faster on two cores: 609 s and 594.
"""

import os
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

RAY = "pytest.mark.ray"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    options, is_one_of_them = config.option, hasattr(config, "workerinput")
    of_folders = all(Path(argument).is_dir() for argument in config.args)
    if options.numprocesses is None and of_folders and not is_one_of_them and not options.usepdb:
        options.numprocesses, options.dist, options.loadscopereorder = 2, "loadfile", False
        # Each has a core. With two threads each, a product's threads wait for one that has none: 143 s of wall time for
        # the 25 s of CPU time of test_native_quantized.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@cache
def shares_ray(path: Path) -> bool:
    """Whether tests of the file have the mark."""
    return RAY in path.read_text()


class Files(LoadScopeScheduling):
    """A process that comes to the end of its file gets the next one."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return RAY if shares_ray(self.config.rootpath / path) else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Files:
    return Files(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that share a Ray take longest: they are first. Then come those that ask for most time, and then
    those of the most tests: no process has a long file at the end, when the others have nothing left."""
    num_tests = Counter(item.path for item in items)
    timeouts = Counter[Path]()
    for item in items:
        if mark := item.get_closest_marker("timeout"):
            timeouts[item.path] = max(timeouts[item.path], mark.args[0])

    def place(item: pytest.Item) -> tuple[int, float, int]:
        return (0, 0, 0) if shares_ray(item.path) else (1, -timeouts[item.path], -num_tests[item.path])

    items.sort(key=place)
