"""Several answers at once: the choices of one call, each a sequence of its own. Knows no front."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from cluster.errors import DeadlineExceeded
from cluster.serving.service import InferenceService
from cluster.serving.text.prompts import Prompt
from cluster.types import FinishReason, Logprobs, SamplingParams, TextDelta, Usage

MAX_CHOICES = 128  # of one prompt; OpenAI's limit for n
MIN_SHARED_TOKENS = 32  # two blocks of the cache; a shorter prompt is computed sooner than awaited
MAX_UNTAKEN = 64  # deltas of a call that wait for its client


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call's name in logs, and the client that it counts for.

    accepted: its client has been told that it will be answered: a draining server begins it, too.
    adapter: the name of the one that computes its prompts, "" for the base alone.
    one_name: its answers have all its own name, by which they can be aborted; else each has a number, too.
    timeout_s: its time budget, None for no bound.
    """

    request_id: str
    client: str
    accepted: bool = False
    adapter: str = ""
    one_name: bool = False
    timeout_s: float | None = None

    def left_s(self, spent_s: float) -> float | None:
        """The rest of its time budget. Raises DeadlineExceeded where there is none."""
        if self.timeout_s is not None and spent_s >= self.timeout_s:
            raise DeadlineExceeded(
                f"request {self.request_id} did not finish within its time budget of {self.timeout_s:g} s"
            )
        return None if self.timeout_s is None else self.timeout_s - spent_s


@dataclass(slots=True)
class Choice:
    """One answer, as far as it has come."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    matched_stop: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    usage: Usage = field(default_factory=lambda: Usage(prompt_tokens=0, completion_tokens=0))

    def add(self, delta: TextDelta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason, self.matched_stop = delta.finish_reason, delta.matched_stop
        self.prompt_tokens, self.cached_tokens = delta.prompt_tokens, delta.cached_tokens
        self.usage = delta.usage or self.usage


def variants(params: SamplingParams, num: int) -> list[SamplingParams]:
    """The parameters of each of several answers to one prompt; with a seed each has another one. Source: vLLM."""
    if params.seed is None:
        return [params] * num
    return [replace(params, seed=(params.seed + index) % 2**63) for index in range(num)]


def total(choices: Sequence[Choice], num_each: int) -> Usage:
    """The tokens of a call's choices; a prompt counts once for its `num_each` choices."""
    return Usage(
        prompt_tokens=sum(choice.usage.prompt_tokens for choice in choices[::num_each]),
        completion_tokens=sum(choice.usage.completion_tokens for choice in choices),
        cached_tokens=sum(choice.usage.cached_tokens for choice in choices[::num_each]),
    )


def best(choices: Sequence[Choice], num: int) -> list[Choice]:
    """The choices with the highest log-probability for each token, best first. Source: OpenAI's API reference."""

    def mean(choice: Choice) -> float:
        return sum(entry.logprob for entry in choice.logprobs) / max(1, len(choice.logprobs))

    return sorted(choices, key=mean, reverse=True)[:num]


def behind(
    asked: Sequence[tuple[Prompt, SamplingParams]], continued: Sequence[tuple[int, ...]]
) -> list[tuple[Prompt, SamplingParams]]:
    """The same, each behind the tokens that its client has. One that begins keeps its prompt object."""
    return [
        (replace(prompt, continue_from=tokens) if tokens else prompt, params)
        for (prompt, params), tokens in zip(asked, continued, strict=True)
    ]


async def nothing(num_choices: int) -> AsyncGenerator[tuple[int, TextDelta], None]:
    """Yields answers without a token, of calls that ask for none."""
    for index in range(num_choices):
        yield index, TextDelta(finish_reason="length")


async def collect(deltas: AsyncGenerator[tuple[int, TextDelta], None], num_choices: int) -> list[Choice]:
    """Returns the whole answers. Raises ClusterError, the first that any of them meets."""
    choices = [Choice() for _ in range(num_choices)]
    async with aclosing(deltas):
        async for index, delta in deltas:
            choices[index].add(delta)
    return choices


async def generate(
    service: InferenceService, asked: Sequence[tuple[Prompt, SamplingParams]], call: Call
) -> AsyncGenerator[tuple[int, TextDelta], None]:
    """Yields (index, delta) of every answer as they come. The first error ends all; closing it cancels all.

    As many are made at a time as admission lets one call have, in their order. Of answers to one prompt object the
    first begins alone, and the others when its prompt is computed: they go to the same replica, and find its keys and
    values in the cache.
    """
    several = len(asked) > 1
    leaders = [_leader(asked, index) for index in range(len(asked))]
    sizes, group = Counter(leaders), service.new_request_id()  # clients may call two requests the same
    at_a_time, began_s = service.admission.at_a_time(), service.now_s()

    def stream_of(index: int) -> AsyncGenerator[TextDelta, None]:
        """Raises DeadlineExceeded."""
        prompt, params = asked[index]
        return service.stream(
            prompt,
            params,
            request_id=f"{call.request_id}-{index}" if several and not call.one_name else call.request_id,
            timeout_s=call.left_s(service.now_s() - began_s) if index >= at_a_time else call.timeout_s,
            client=call.client,
            prompt_group=f"{group}-{leaders[index]}" if sizes[leaders[index]] > 1 else "",
            accepted=call.accepted,
            goes_on=index >= at_a_time,
        )

    if not several:
        async with aclosing(stream_of(0)) as stream:
            async for delta in stream:
                yield 0, delta
        return
    async with aclosing(_merged(stream_of, leaders, at_a_time)) as deltas:
        async for each in deltas:
            yield each


async def with_stop_strings(
    deltas: AsyncGenerator[tuple[int, TextDelta], None],
) -> AsyncGenerator[tuple[int, TextDelta], None]:
    """Yields the same deltas; an answer that a stop string ended ends with it."""
    async with aclosing(deltas):
        async for index, delta in deltas:
            yield index, replace(delta, text=delta.text + delta.matched_stop) if delta.matched_stop else delta


def _leader(asked: Sequence[tuple[Prompt, SamplingParams]], index: int) -> int:
    """The answer whose prompt an answer waits for: its own index for none."""
    prompt = asked[index][0]
    if not isinstance(prompt.token_ids, Sequence) or len(prompt.token_ids) < MIN_SHARED_TOKENS:
        return index
    while index and asked[index - 1][0] is prompt:
        index -= 1
    return index


async def _merged(
    stream_of: Callable[[int], AsyncGenerator[TextDelta, None]], leaders: Sequence[int], at_a_time: int
) -> AsyncGenerator[tuple[int, TextDelta], None]:
    begun = [asyncio.Event() for _ in leaders]
    waiting = iter(range(len(leaders)))  # an answer's leader is taken before it
    news: asyncio.Queue[tuple[int, TextDelta] | Exception | None] = asyncio.Queue(MAX_UNTAKEN)

    async def pump() -> None:
        try:
            for index in waiting:
                if leaders[index] != index:
                    await begun[leaders[index]].wait()
                async with aclosing(stream_of(index)) as stream:
                    async for delta in stream:
                        begun[index].set()
                        await news.put((index, delta))
            await news.put(None)
        except Exception as error:  # noqa: BLE001 it is raised where the news are taken
            await news.put(error)

    pumps = [asyncio.create_task(pump()) for _ in leaders[:at_a_time]]
    try:
        running = len(pumps)
        while running:
            one = await news.get()
            if isinstance(one, Exception):
                raise one
            if one is None:
                running -= 1
            else:
                yield one
    finally:
        for each in pumps:
            each.cancel()
        await asyncio.wait(pumps)
