"""One engine in virtual time: which tokens its steps compute. Counts tokens; knows no seconds.

The rules are those of the scheduler, in numbers alone: sequences that need their next token come first; prompts share
what is left, the shortest rest first, and half is kept for the one whose turn it is; where the cache is full, the
latest gives its tokens up and is computed again. A decoding sequence stands in a heap by the step that ends it, so that
a step looks at none that goes on.
"""

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from cluster.planning.costs import StepWork
from cluster.planning.load import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one engine. cache_tokens: whose keys and values it keeps."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting: int
    cache_tokens: int
    block_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """steps: so many alike ones in a row; only a step without prompts is one of several.  parts: the tokens of each
    prompt in it.  begun: requests that begin with it."""

    work: StepWork
    parts: tuple[tuple[Request, int], ...] = ()
    steps: int = 1
    begun: int = 0


@dataclass(slots=True)
class Ended:
    """A step's first tokens and ends."""

    first_tokens: list[Request] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)


class EngineModel:
    """Its requests; those that run are in the order in which they began."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: deque[Request] = deque()
        self.running: dict[Request, None] = {}
        self.num_preempted = 0
        self._prompts: list[Request] = []
        self._decoding: list[tuple[int, int, Request]] = []  # a heap; some in it have lost their blocks
        self._num_decoding = 0
        self._context = 0  # tokens of decoding sequences in the cache
        self._step = 0
        self._turns = self._begun = 0

    @property
    def num_requests(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def num_free_places(self) -> int:
        return self.limits.max_num_seqs - len(self.running)

    @property
    def used(self) -> float:
        """Share of the cache."""
        return self._held / self.limits.cache_tokens

    @property
    def _held(self) -> float:
        """Tokens in the cache, with half a block for the unfilled one of each sequence."""
        prompts = sum(r.prompt_tokens + r.produced - r.uncomputed for r in self._prompts)
        return self._context + prompts + len(self.running) * self.limits.block_size / 2

    def add(self, request: Request) -> bool:
        """Queues a request; False where the queue is full."""
        if not request.replayed and self.num_requests - self.limits.max_num_seqs >= self.limits.max_waiting:
            return False
        self.waiting.append(request)
        return True

    def plan(self, most_steps: int) -> Step | None:
        """The next step, or several alike ones; None without work."""
        if not self.running and not self.waiting:
            return None
        preempted = self._make_room()
        before = len(self.running)
        parts = self._parts(preempted)
        while not parts and not self._num_decoding:  # prompts fill the cache, and none has room to go on
            assert self.running, "a request that the cache has no room for was let in"
            self._preempt_latest()
            before = len(self.running)
            parts = self._parts(preempted=True)
        begun = len(self.running) - before
        steps = 1 if parts or not self._num_decoding else max(1, min(most_steps, self._next_end() - self._step))
        tokens = sum(part for _, part in parts)
        completed = sum(request.uncomputed == part for request, part in parts)
        earlier = sum(r.prompt_tokens + r.produced - r.uncomputed for r, _ in parts)
        work = StepWork(
            rows=self._num_decoding + tokens,
            samples=self._num_decoding + completed,
            context=self._context + earlier + self._num_decoding * (steps - 1) / 2,
        )
        return Step(work=work, parts=parts, steps=steps, begun=begun)

    def finish(self, step: Step, num_steps: int) -> Ended:
        """Takes in a step, or the first num_steps of several."""
        found = Ended()
        self._step += num_steps
        self._context += self._num_decoding * num_steps
        while self._decoding and self._decoding[0][0] <= self._step:
            at, began, request = heapq.heappop(self._decoding)
            if self._is_stale(at, began, request):
                continue
            request.produced = request.output_tokens
            self._num_decoding -= 1
            self._context -= request.prompt_tokens + request.output_tokens - 1
            del self.running[request]
            found.ended.append(request)
        for request, tokens in step.parts:
            request.uncomputed -= tokens
            if not request.uncomputed:
                self._choose_first(request, found)
        return found

    def take_all(self) -> list[Request]:
        """Empties it, as its death does; each request has its tokens so far, and all of them to be computed again."""
        for at, began, request in self._decoding:
            if not self._is_stale(at, began, request):
                request.produced = request.output_tokens - (at - self._step)
        requests = [*self.running, *self.waiting]
        for request in requests:
            _begin_again(request)
        self.waiting.clear()
        self.running.clear()
        self._prompts.clear()
        self._decoding.clear()
        self._num_decoding = self._context = 0
        return requests

    def _choose_first(self, request: Request, found: Ended) -> None:
        """A prompt is computed: its next token is there."""
        self._prompts.remove(request)
        if not request.produced:
            found.first_tokens.append(request)
        request.produced += 1
        if request.produced == request.output_tokens:
            del self.running[request]
            found.ended.append(request)
            return
        request.last_step = self._step + request.output_tokens - request.produced
        heapq.heappush(self._decoding, (request.last_step, request.began, request))
        self._num_decoding += 1
        self._context += request.prompt_tokens + request.produced - 1

    def _parts(self, preempted: bool) -> tuple[tuple[Request, int], ...]:
        if not self._prompts and (preempted or not self.waiting):
            return ()
        return tuple(self._share(self.limits.max_num_batched_tokens - self._num_decoding, preempted))

    def _share(self, budget: int, preempted: bool) -> Iterator[tuple[Request, int]]:
        """Shares a step's tokens among prompts."""
        waiting = [] if preempted else list(islice(self.waiting, max(0, self.num_free_places)))
        for request in waiting[:1]:
            self._take_turn(request)
        candidates = [*waiting]
        for request in list(self._prompts):
            if request.uncomputed > 1 or budget <= 0:
                candidates.append(request)
            else:  # as one that decodes
                budget -= 1
                yield request, 1
        if not candidates or budget <= 0:
            return
        first = min([*candidates[len(waiting) :], *waiting[:1]], key=lambda request: request.turn)
        kept, room = min(first.uncomputed, -(-budget // 2)), self.limits.cache_tokens - self._held
        begins = set(waiting)
        for request in sorted(candidates, key=lambda r: (r.uncomputed, r is not first)):
            kept = 0 if request is first else kept
            tokens = min(request.uncomputed, budget - kept)
            if tokens <= 0 or tokens > room:
                continue
            if request in begins:
                self._begin(request)
            budget -= tokens
            room -= tokens
            yield request, tokens

    def _begin(self, request: Request) -> None:
        self.waiting.remove(request)
        self._take_turn(request)
        request.began, self._begun = self._begun, self._begun + 1
        self.running[request] = None
        self._prompts.append(request)

    def _take_turn(self, request: Request) -> None:
        if request.turn < 0:
            request.turn, self._turns = self._turns, self._turns + 1

    def _make_room(self) -> bool:
        """Takes the blocks of the latest ones, until those that decode have room for a token more."""
        preempted = False
        while len(self.running) > 1 and self._held + self._num_decoding > self.limits.cache_tokens:
            self._preempt_latest()
            preempted = True
        return preempted

    def _preempt_latest(self) -> None:
        latest = next(reversed(self.running))
        del self.running[latest]
        if latest in self._prompts:
            self._prompts.remove(latest)
        else:
            latest.produced = latest.output_tokens - (latest.last_step - self._step)
            self._num_decoding -= 1
            self._context -= latest.prompt_tokens + latest.produced - 1
        _begin_again(latest)
        self.waiting.appendleft(latest)
        self.num_preempted += 1

    def _next_end(self) -> int:
        """The number of the step that ends the next sequence."""
        while self._is_stale(*self._decoding[0]):
            heapq.heappop(self._decoding)
        return self._decoding[0][0]

    def _is_stale(self, at: int, began: int, request: Request) -> bool:
        """Whether an entry of the heap is of an earlier life of its request."""
        return request not in self.running or request.began != began or request.last_step != at


def _begin_again(request: Request) -> None:
    request.uncomputed = request.prompt_tokens + request.produced
    request.last_step = -1
