"""Prompts whose answers are numbers: one call's, at the engine a few at a time. Knows no paths."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fastapi import Request

from cluster.outcome import Computed, Wants
from cluster.serving.openai.prompts import to_prompts
from cluster.serving.openai.result_schema import InputRequest, PromptUsage
from cluster.serving.openai.served import Served
from cluster.serving.openai.several import a_few_at_a_time
from cluster.serving.outcomes import unit_vector
from cluster.serving.text.prompts import Prompt

Check = Callable[[Computed], None]


class ResultCall:
    """One call: its id, its client, and how its prompts are computed."""

    def __init__(self, served: Served, request: Request, kind: str, model: str | None) -> None:
        """model: as the body names it. Raises NotFound."""
        self._served, self._client, self._model = served, request.state.client, model
        self.adapter = served.adapter_of(model)
        self._request_id = f"{kind}-{request.state.request_id}"

    async def compute(self, body: InputRequest, wants: Wants, check: Check = lambda _: None) -> list[Computed]:
        """As `compute_each`."""
        return await self.compute_each(to_prompts(body.input, "input", self.adapter), wants, check)

    async def compute_each(
        self, prompts: Sequence[Prompt], wants: Wants, check: Check = lambda _: None
    ) -> list[Computed]:
        """Returns all results, in their prompts' order. Raises the first ClusterError, and ends the others.

        check: sees each result, and may refuse it.
        """

        service = self._served.service

        async def one(index: int, prompt: Prompt, goes_on: bool) -> Computed:
            request_id = f"{self._request_id}-{index}" if len(prompts) > 1 else self._request_id
            result = await service.compute(prompt, wants, request_id=request_id, client=self._client, goes_on=goes_on)
            check(result)
            return result

        return await a_few_at_a_time(one, prompts, service.admission.at_a_time())

    def answered(self, computed: Sequence[Computed]) -> dict[str, Any]:
        """The fields that all of these answers have."""
        num_tokens = sum(len(one.prompt_token_ids) for one in computed)
        return {
            "id": self._request_id,
            "created": int(self._served.now_s()),
            "model": self._served.shown_model(self._model),
            "usage": PromptUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
        }


def vectors(computed: Sequence[Computed], normalize: bool | None) -> list[np.ndarray]:
    """Returns the results' arrays, [H] each, of length one unless normalize is False."""
    arrays = [one.numbers.array() for one in computed]
    return arrays if normalize is False else [unit_vector(array) for array in arrays]
