"""One request while the engine works on it. Knows no tensors."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster.engine.block_table import BlockTable
from cluster.engine.drafting import Drafting
from cluster.grammar.state import GrammarState
from cluster.model.adapters import Adapter
from cluster.model.penalties import PenaltyState
from cluster.model.sampler import Sampled
from cluster.outcome import EVERY_ROW
from cluster.types import EngineRequest, FinishReason, SamplingParams

NO_TURN = -1


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable; only the engine's thread touches it.

    token_ids: prompt and output.  num_computed_tokens: tokens whose keys and values are in the cache.
    block_tables: its cache blocks in order, for each group of layers; the block manager fills them.
    block_digests: of its first blocks, as far as they were needed.  num_remembered_blocks: of its first blocks, those
    that others can find.
    turn: a number that the scheduler gives it when its turn to have its prompt computed comes; the lowest goes first.
    num_reused_blocks: of its first blocks, those that another sequence has computed.
    num_cached_tokens: of its first tokens, those that were in the cache when it began first.
    deadline, arrived_at, lost_since: on the engine's clock, in seconds.
    lost_since: when it was first found to need an expert without a living copy; None while its steps succeed.
    held: it keeps its blocks and takes part in no step until there is news of that expert.
    stop_token_ids: tokens that end it, the model's EOS ids among them unless ignore_eos.
    block_salt: names anything but its tokens that its keys and values depend on (its adapter's); sequences of different
    salts share no block.
    adapter: by which it is computed; None for the base alone.
    grammar: of its constraint, at its last token; set before it is scheduled.
    drafting: what is known of the drafts of its next tokens.
    """

    request: EngineRequest
    params: SamplingParams
    stop_token_ids: frozenset[int]
    arrived_at: float
    deadline: float | None
    block_salt: bytes = b""
    token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0
    block_tables: list[BlockTable] = field(default_factory=list)
    block_digests: list[bytes] = field(default_factory=list)
    num_remembered_blocks: int = 0
    num_reused_blocks: int = 0
    num_cached_tokens: int = 0
    turn: int = NO_TURN
    penalties: PenaltyState = field(default_factory=PenaltyState)
    started: bool = False
    lost_since: float | None = None
    held: bool = False
    grammar: GrammarState | None = None
    adapter: Adapter | None = None
    drafting: Drafting = field(default_factory=Drafting)

    def __post_init__(self) -> None:
        self.token_ids = [*self.request.prompt_token_ids, *self.request.output_token_ids]
        if self.adapter is not None:
            self.block_salt = self.adapter.salt

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def wants_tokens(self) -> bool:
        """Else it ends when its prompt is computed, with numbers and no new token."""
        return self.request.wants == "tokens"

    @property
    def wants_every_row(self) -> bool:
        """Whether its result needs the hidden states of all its tokens, not of the last one alone."""
        return self.request.wants in EVERY_ROW

    @property
    def keeps_non_finite(self) -> bool:
        """Whether its caller looks at all numbers as they are, so that NaN does not end it."""
        return self.request.wants == "hidden_states"

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def progress(self) -> str:
        """How far it has come, for an error's message."""
        if self.wants_tokens:
            return f"{self.num_output_tokens} of {self.params.max_tokens} tokens"
        return f"{self.num_computed_tokens} of its {len(self.token_ids)} tokens"

    @property
    def is_suspect(self) -> bool:
        """Whether it must be computed alone: an engine died at it, and it has brought too few tokens since."""
        num_new_tokens = self.num_output_tokens - len(self.request.output_token_ids)
        return num_new_tokens < self.request.num_alone_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    def take(self, new_tokens: Iterable[Sampled]) -> list[Sampled]:
        """Appends new tokens up to the one that ends it; returns these."""
        taken = []
        for token in new_tokens:
            if self.grammar is not None:
                self.grammar.accept(token[0])
            self.token_ids.append(token[0])
            taken.append(token)
            if self.end():
                break
        return taken

    def end(self) -> FinishReason | None:
        """The reason to end with its last token, if there is one."""
        if self.token_ids[-1] in self.stop_token_ids and self.num_output_tokens > self.params.min_tokens:
            return "stop"
        if self.grammar is not None and self.grammar.is_complete:
            return "stop"  # nothing may follow but an EOS, below min_tokens and with ignore_eos too
        return "length" if self.num_output_tokens >= (self.params.max_tokens or 1) else None
