"""Three processes run the tests, by pytest-xdist: tests wait most of their time, for processes of Ray.

A process takes a file at a time. One takes all files whose tests share the served application, and one all others that
share a Ray. (xdist has groups by marks, which pytest 9.2 breaks.) Single files, and all with `-n0`, are run by the
process that is started.
"""

import os
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

RAY = "pytest.mark.ray"
APPLICATION = "the served application"
# A function that takes one of the fixtures: a test, or a fixture of the file.
TAKES_THE_APPLICATION = re.compile(r"^\s*def .*\b(application|served|served_for_good)\b[,:)]", re.MULTILINE)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    options, is_one_of_them = config.option, hasattr(config, "workerinput")
    of_folders = all(Path(argument).is_dir() for argument in config.args)
    if options.numprocesses is None and of_folders and not is_one_of_them and not options.usepdb:
        options.numprocesses, options.dist, options.loadscopereorder = 3, "loadfile", False
        # With two threads each, a product's threads wait for one that has no core: 143 s of wall time for the 25 s of
        # CPU time of test_native_quantized.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@cache
def shared(path: Path) -> str:
    """Returns the name of the group of files that the file belongs to; an empty one for a file on its own."""
    text = path.read_text()
    if RAY not in text:
        return ""
    return APPLICATION if TAKES_THE_APPLICATION.search(text) else RAY


class Files(LoadScopeScheduling):
    """A process that comes to the end of its file gets the next one."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return shared(self.config.rootpath / path) or path


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Files:
    return Files(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that share something take longest: they are first. Then come those that ask for most time, and then
    those of the most tests: no process has a long file at the end, when the others have nothing left."""
    num_tests = Counter(item.path for item in items)
    timeouts = Counter[Path]()
    for item in items:
        if mark := item.get_closest_marker("timeout"):
            timeouts[item.path] = max(timeouts[item.path], mark.args[0])

    def place(item: pytest.Item) -> tuple[int, float, int]:
        order = [APPLICATION, RAY, ""].index(shared(item.path))
        return (order, 0, 0) if shared(item.path) else (order, -timeouts[item.path], -num_tests[item.path])

    items.sort(key=place)
