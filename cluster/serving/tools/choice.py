"""Whether an answer may or must call tools, in words that all fronts share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from cluster import inputs
from cluster.errors import InvalidRequest
from cluster.serving.tools.forced import forced_calls
from cluster.structured import StructuredOutputsParams

Mode = Literal["none", "auto", "required"]
MODES: tuple[Mode, ...] = ("none", "auto", "required")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """mode: none shows the model no tools; auto lets it choose; required makes it call one at least.
    name: of the one function that it must call, once; with required.  several: whether it may call more than one.
    """

    mode: Mode = "auto"
    name: str | None = None
    several: bool = True

    @classmethod
    def of(cls, given: Any, *, several: bool = True) -> Self:
        """Reads OpenAI's `tool_choice`; None is auto. Raises InvalidRequest."""
        if given is None or given in MODES:
            return cls(mode=given or "auto", several=several)
        function = given.get("function") if isinstance(given, Mapping) and given.get("type") == "function" else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            named = '{"type": "function", "function": {"name": …}}'
            raise InvalidRequest(
                f"tool_choice is {inputs.shown(given)}, one of {', '.join(MODES)} or {named} is needed", "tool_choice"
            )
        return cls(mode="required", name=function["name"], several=several)

    def form(
        self, tools: Sequence[Mapping[str, Any]], given: StructuredOutputsParams | None
    ) -> StructuredOutputsParams | None:
        """Returns the form of the answer: of the calls that are required, else the one that the request has.

        tools: as in the OpenAI API. Raises InvalidRequest.
        """
        if self.mode != "required":
            return given
        if given is not None:
            raise InvalidRequest(
                "tool_choice asks for a call, and another field for another form: give one", "tool_choice"
            )
        return forced_calls(tools, self.name, several=self.several)
