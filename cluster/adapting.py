"""An `LLM`'s LoRA adapters: those that are loaded, another one, one less."""

import os
from typing import Protocol

from cluster.config.lora import check_names
from cluster.engine.engine import Engine
from cluster.llm_arguments import directories


class HasEngine(Protocol):
    """A mixin's other half: `LLM` has it."""

    engine: Engine

    def _check_open(self) -> None: ...


class Adapts(HasEngine, Protocol):
    """Adds adapters to an `LLM`."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of those that are loaded."""
        return self.engine.adapters.names

    def load_adapter(self, name: str, directory: str | os.PathLike[str]) -> None:
        """Loads one, in place of another one of that name. Raises CheckpointError, SetupError, Closed; then nothing has
        changed."""
        self._check_open()
        given = directories({name: directory}) or {}
        check_names(given)
        self.engine.adapters.load(name, given[name])

    def unload_adapter(self, name: str) -> None:
        """Raises NotFound, Closed."""
        self._check_open()
        self.engine.adapters.unload(name)
