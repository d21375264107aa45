"""Answers of an `LLM` that are not whole yet: each takes its sequence's updates in, as the engine's steps give them."""

from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from cluster.engine.engine import Engine
from cluster.engine.isolation import failure_of
from cluster.errors import ClusterError
from cluster.outcome import Computed
from cluster.serving.outcomes import result_of
from cluster.serving.text.answer import Answer
from cluster.types import CompletionOutput, EngineRequest, Logprobs, SequenceUpdate

Output = TypeVar("Output")


class Open(Protocol[Output]):
    """An answer that is not whole. finished: the whole of it, once its last piece has come."""

    request: EngineRequest
    finished: Output | None

    def add(self, update: SequenceUpdate) -> None:
        """Takes an update in. Raises the update's error."""


@dataclass(slots=True)
class OpenAnswer:
    """One answer's pieces. finished: the whole of it, once its last piece has come."""

    request: EngineRequest
    answer: Answer
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finished: CompletionOutput | None = None

    def add(self, update: SequenceUpdate) -> None:
        """Takes an update in. Raises the update's error."""
        delta = self.answer.add(update)
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        if delta.finish_reason is None:
            return
        self.finished = CompletionOutput(
            request_id=self.request.request_id,
            prompt_token_ids=self.request.prompt_token_ids,
            token_ids=tuple(self.token_ids),
            text="".join(self.texts),
            finish_reason=delta.finish_reason,
            logprobs=tuple(self.logprobs),
            cached_tokens=min(update.cached_tokens, len(self.request.prompt_token_ids)),
        )


@dataclass(slots=True)
class OpenResult:
    """One result that is not there yet. finished: the result, once it has come."""

    request: EngineRequest
    finished: Computed | None = None

    def add(self, update: SequenceUpdate) -> None:
        """Takes an update in. Raises the update's error."""
        numbers = result_of(update, self.request.called)
        if numbers is not None:
            request = self.request
            self.finished = Computed(
                request_id=request.request_id, prompt_token_ids=request.prompt_token_ids, numbers=numbers
            )


def complete(engine: Engine, open_answers: dict[str, Open[Output]]) -> list[ClusterError]:
    """Makes steps until every answer has ended, and takes each out then. Returns errors in the order they came."""
    failures: list[ClusterError] = []
    while open_answers:
        for update in engine.step():
            answer = open_answers.get(update.request_id)
            if answer is None:
                continue
            try:
                answer.add(update)
                ended = answer.finished is not None
            except Exception as error:  # noqa: BLE001 it is this answer's alone
                failures.append(error if isinstance(error, ClusterError) else failure_of(update.request_id, error))
                ended = True
            if ended:
                del open_answers[update.request_id]
                if update.finish_reason is None:  # a stop string, of which the engine knows nothing
                    engine.cancel(update.request_id)
    return failures
