"""An `LLM`'s answers to conversations, with vLLM's names. Knows no engine and no template."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from cluster import inputs
from cluster.conversation import ChatMessage, Conversation
from cluster.errors import ClusterError, InvalidRequest
from cluster.serving.text.prompts import OneAdapter, OneParams, Prompt, to_params, with_adapter
from cluster.serving.tools.choice import ToolChoice
from cluster.serving.tools.whole import read_calls
from cluster.structured import StructuredOutputsParams
from cluster.types import CompletionOutput, SamplingParams

OneMessage = ChatMessage | Mapping[str, Any]
Messages = Sequence[OneMessage] | Iterable[Sequence[OneMessage]]


class Answers(Protocol):
    """Answers prompts. A mixin's other half: `LLM` has it."""

    def answer(
        self, prompts: list[Prompt], params: OneParams | Iterable[OneParams] | None
    ) -> list[CompletionOutput]: ...


class Chats(Answers, Protocol):
    """Adds `chat` to an `LLM`."""

    def chat(
        self,
        messages: Messages,
        params: OneParams | Iterable[OneParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        adapter: OneAdapter = "",
    ) -> list[CompletionOutput]:
        """Answers a conversation, or several in their order, as the checkpoint's chat template renders them.

        messages: of one conversation, or a list of these: objects with a "role" and a "content", and what else the
        template reads: "tool_calls" with their arguments as objects, "tool_call_id", "name", "reasoning_content".
        tools: JSON schemas of functions, as in the OpenAI API; answers then have `tool_calls` and `message`.
        tool_choice: "auto", "none" (tools are not shown), "required" (one call at least, by a grammar of the tools'
        schemas) or {"type": "function", "function": {"name": …}} (one of that function). Default: auto.
        parallel_tool_calls: false keeps the first call alone.  documents: objects with a "title" and a "text".
        add_generation_prompt: begins the assistant's turn. Default: true, or false with continue_final_message, which
        goes on with the last turn's content, or with the field that it names.
        chat_template: a Jinja template, or the name of one of the checkpoint's. Default: "tool_use" for tools, else
        "default", or the only one.  chat_template_kwargs: further variables of the template.
        The rest is as for `generate`. The text is that of transformers' `apply_chat_template`.
        """
        choice = ToolChoice.of(tool_choice, several=inputs.truth_value(parallel_tool_calls, "parallel_tool_calls"))
        options: dict[str, Any] = {
            "tools": None if choice.mode == "none" else tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template": chat_template,
            "template_kwargs": {} if chat_template_kwargs is None else chat_template_kwargs,
        }
        if add_generation_prompt is None:
            options["add_generation_prompt"] = not continue_final_message
        chats = _conversations(messages, options)
        every = [_with_choice(one, choice, chats[0].tools or ()) for one in to_params(params, len(chats))]
        prompts = with_adapter([Prompt(chat=chat) for chat in chats], adapter)
        if not chats[0].tools:
            return self.answer(prompts, every)
        try:
            return [_with_calls(output, choice) for output in self.answer(prompts, every)]
        except ClusterError as error:
            error.outputs = [None if output is None else _with_calls(output, choice) for output in error.outputs]
            raise


def _with_choice(params: SamplingParams, choice: ToolChoice, tools: Sequence[Any]) -> SamplingParams:
    """With the form of the calls that are required. Raises InvalidRequest."""
    if choice.mode != "required":
        return params
    given = params.structured_outputs
    form = choice.form(tools, None if given is None else StructuredOutputsParams.of(given))
    return replace(params, structured_outputs=form)


def _with_calls(output: CompletionOutput, choice: ToolChoice) -> CompletionOutput:
    content, calls = read_calls(output.text)
    return replace(output, content=content, tool_calls=calls if choice.several else calls[:1])


def _conversations(given: Any, options: dict[str, Any]) -> list[Conversation]:
    """Raises InvalidRequest."""
    if not inputs.is_series(given):
        raise InvalidRequest(f"messages is {inputs.shown(given)}, a list of messages is needed", "messages")
    every = list(given)
    if not every or not inputs.is_series(every[0]):
        return [Conversation(messages=every, **options)]
    found = []
    for position, messages in enumerate(every):
        try:
            found.append(Conversation(messages=messages, **options))
        except InvalidRequest as error:
            raise InvalidRequest(f"messages[{position}]: {error}", error.field) from error
    return found
