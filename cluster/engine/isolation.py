"""Runs a step so that an exception ends the sequences that it belongs to, and no others. Knows no tensors."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from cluster.engine.block_manager import BlockManager
from cluster.engine.sequence import Sequence as EngineSequence
from cluster.engine.step import Batch, Runner, ScheduledSequence, StepResult
from cluster.errors import ClusterError, NonFiniteOutput, RequestFailed, Unavailable
from cluster.model.sampler import NoFiniteNumbers
from cluster.outcome import Wants
from cluster.types import EngineRequest, SamplingParams

log = logging.getLogger(__name__)

MAX_REASON_CHARS = 400

T = TypeVar("T")

# Called with the ids of a step's requests before it is computed, and with a request's before it is taken in.
OnStep = Callable[[Sequence[str]], None]


def run_isolated(runner: Runner, batch: Batch, on_step: OnStep) -> StepResult:
    """Blocks. A step that raises is run again in halves, down to the sequences that raise alone: those have failed.

    An Unavailable is every sequence's: a part of the cluster is missing. Raises the device's fault, which ends all.
    """
    on_step([s.sequence.request_id for s in batch.scheduled])
    try:
        return runner.run(batch)
    except Exception as error:  # noqa: BLE001 the halves show which sequence it belongs to
        runner.check_device()
        size = len(batch.scheduled)
        if size == 1 or isinstance(error, Unavailable):
            return StepResult([()] * size, failed=dict.fromkeys(range(size), error))
        log.warning("a step of %d sequences is run again in halves: %s: %s", size, type(error).__name__, error)
    middle = size // 2
    first = run_isolated(runner, Batch(batch.scheduled[:middle]), on_step)
    second = run_isolated(runner, Batch(batch.scheduled[middle:]), on_step)
    return StepResult(
        [*first.tokens, *second.tokens],
        {**first.parts, **_moved(second.parts, middle)},
        {**first.lost, **_moved(second.lost, middle)},
        first.epoch or second.epoch,
        {**first.failed, **_moved(second.failed, middle)},
        first.num_drafted + second.num_drafted,
        first.num_accepted + second.num_accepted,
    )


def _moved(by_number: Mapping[int, T], offset: int) -> dict[int, T]:
    return {offset + number: value for number, value in by_number.items()}


def prove(runner: Runner, blocks: BlockManager, on_step: OnStep, wants: Wants) -> None:
    """After a step in which every sequence failed: computes what nobody asked for, of a kind that the model has.

    Raises if that fails too, because then the engine is broken, and another one serves its requests better.
    """
    params = SamplingParams(temperature=0, max_tokens=1)
    request = EngineRequest(request_id="proof", prompt_token_ids=(0,), params=params, wants=wants)
    sequence = EngineSequence(request=request, params=params, stop_token_ids=frozenset(), arrived_at=0.0, deadline=None)
    if not blocks.allocate(sequence, 1):
        return
    try:
        failed = run_isolated(runner, Batch((ScheduledSequence(sequence, 1),)), on_step).failed.get(0)
    finally:
        blocks.free(sequence)
    if failed is not None and not isinstance(failed, ClusterError | NoFiniteNumbers):
        raise failed


def failure_of(name: str, error: Exception) -> ClusterError:
    """The error that the request of that name ends with; a bug's traceback goes to the log."""
    if isinstance(error, ClusterError):
        log.warning("request %s ends: %s", name, error)
        return error
    if isinstance(error, NoFiniteNumbers):
        log.error("request %s ends: %s", name, error)
        return NonFiniteOutput(
            f"request {name}: the model gave no finite numbers for it: look for NaN or infinity in "
            "the checkpoint's weights, or serve with dtype bfloat16 or float32 if it is float16 that overflows"
        )
    log.error("request %s ends: %s", name, error, exc_info=error)
    reason = " ".join(str(error).split())[:MAX_REASON_CHARS]  # torch's messages have many lines
    return RequestFailed(
        f"request {name} met an exception of its own, the others go on: {type(error).__name__}: {reason}"
    )
