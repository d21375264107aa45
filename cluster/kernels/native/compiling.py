"""How `pip install` compiles the kernels: pyproject.toml names this class. It runs without this package's others."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from setuptools.command.build_ext import build_ext


class CompileAtOnce(build_ext):  # type: ignore[misc]  # it has no types
    """Compiles the files beside one another: one after the other they take 75 s, of which each variant has its part."""

    def build_extensions(self) -> None:
        compile_all = self.compiler.compile

        def at_once(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(len(sources)) as pool:  # four of them large: 0.4 GB each
                made = pool.map(lambda source: compile_all([source], **options), sources)
                return [file for files in made for file in files]

        self.compiler.compile = at_once
        super().build_extensions()
