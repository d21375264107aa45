"""The parts of a server that gateways ask for beside the inference service. Knows no gRPC."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.serving.health import HealthState
from cluster.types import SAMPLING_DEFAULTS, EngineStats, SamplingParams


async def _nobody(client: str, names: Sequence[str]) -> None:
    """Ends nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedConfig:
    """A checkpoint's words for itself, in its config.json."""

    model_type: str = ""
    architectures: tuple[str, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayView:
    """aliases: further names by which clients may ask for the model.
    engines: returns the state of each attention replica's engine, as it was lately.
    max_num_seqs: sequences that one of them runs at a time.
    draining: whether new requests are refused.
    tokenizer_files: returns the tokenizer's files, their texts by their names; none without a tokenizer. Blocks.
    defaults: the checkpoint's generation_config.
    abort: ends a client's requests by the names that it gave them.
    """

    health: HealthState
    aliases: tuple[str, ...] = ()
    published: PublishedConfig = field(default_factory=PublishedConfig)
    defaults: SamplingParams = SAMPLING_DEFAULTS
    engines: Callable[[], Sequence[EngineStats]] = tuple
    max_num_seqs: int = 0
    draining: Callable[[], bool] = lambda: False
    tokenizer_files: Callable[[], Mapping[str, str]] = dict
    abort: Callable[[str, Sequence[str]], Awaitable[None]] = _nobody
