"""Bounds the numbers that one call's answer has, and words large answers beside the event loop.

A prompt of 32,768 tokens with 20 likeliest ones each takes seconds to word: streams and health would wait.
"""

import asyncio
from collections.abc import Callable

from fastapi.responses import Response
from pydantic import BaseModel

from cluster.errors import InvalidRequest
from cluster.wire import MAX_ANSWER_BYTES

NUMBER_BYTES = 21  # a float32 in JSON, with its comma: -0.012345678731799126,
BASE64_BYTES = 16 / 3  # the same as four bytes in base64
LOGPROB_BYTES = 75  # "100257":{"logprob":-12.345678329467773,"rank":12,"decoded_token":" word"},


class AnswerSize:
    """Counts the bytes of one call's answer. param: the field that asks for them.  instead: a smaller answer."""

    def __init__(self, param: str, instead: str) -> None:
        self._param, self._instead = param, instead
        self._num_bytes = 0.0

    def add(self, num_bytes: float) -> None:
        """Raises InvalidRequest where the answer becomes too large."""
        self._num_bytes += num_bytes
        if self._num_bytes > MAX_ANSWER_BYTES:
            raise InvalidRequest(
                f"{self._param}: the answer would have more than {MAX_ANSWER_BYTES >> 20} MiB: {self._instead}",
                self._param,
            )


async def worded(make: Callable[[], BaseModel], *, only_set: bool = False) -> Response:
    """Makes and words an answer in a thread. only_set: without the fields that nobody has set."""
    text = await asyncio.to_thread(lambda: make().model_dump_json(exclude_unset=only_set))
    return Response(text, media_type="application/json")
