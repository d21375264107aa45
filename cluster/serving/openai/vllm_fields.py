"""Fields of vLLM's server that change little here, or nothing. Source: vLLM's protocol of chats and completions."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field


class VllmFields(BaseModel):
    """Those that are Literals have the one value that asks for what this server does; another one is refused."""

    include_stop_str_in_output: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    request_id: Annotated[str, Field(pattern=r"^[!-~]{1,96}$")] | None = None
    use_beam_search: Literal[False] | None = None
    skip_special_tokens: Literal[True] | None = None
    priority: Literal[0] | None = None
    # Without effect: of beam search; of tokenizers that are no byte-level ones; a session that nothing here knows.
    length_penalty: float | None = None
    spaces_between_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    session_id: str | None = None

    def truncated(self, token_ids: list[int]) -> list[int]:
        """Returns a prompt's last tokens, as many as are asked for."""
        return token_ids if self.truncate_prompt_tokens is None else token_ids[-self.truncate_prompt_tokens :]
