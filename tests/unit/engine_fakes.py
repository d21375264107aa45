"""A runner without a model, and a clock that is turned by hand."""

from cluster.config import EngineConfig
from cluster.engine.block_manager import BlockManager
from cluster.engine.block_pool import BlockPool
from cluster.engine.engine import Engine
from cluster.engine.runner import right_tokens
from cluster.engine.step import StepResult
from cluster.errors import ShardUnavailable
from cluster.metrics import EngineMetrics, new_registry
from cluster.types import SAMPLING_DEFAULTS, EngineRequest, SamplingParams

EOS = 0


class CountingRunner:
    """Samples last token + 1: the prompt (…, 5) is answered with 6, 7, 8, … Keeps what every step was made of.

    num_ahead: it counts on by so many tokens more a step, where the batch has room for them.
    lost: ids of requests that need an expert without a copy, as of the plan of `epoch`.
    """

    recovery_timeout_s = 10.0

    def __init__(self, num_ahead=0):
        self.num_ahead = num_ahead
        self.steps = []
        self.errors = []
        self.lost = set()
        self.epoch = 1
        self.waits = 0

    def check_device(self):
        pass

    def has_news(self, epoch):
        return self.epoch > epoch

    def wait_for_news(self, epoch, timeout_s):
        self.waits += 1

    def run(self, batch):
        if self.errors:
            raise self.errors.pop()
        self.steps.append([(s.sequence.request_id, s.num_tokens) for s in batch.scheduled])
        lost = {
            i: ShardUnavailable("shard 1 is gone", 1)
            for i, s in enumerate(batch.scheduled)
            if s.sequence.request_id in self.lost
        }
        tokens = [
            [(s.sequence.token_ids[-1] + 1 + n, None) for n in range(1 + s.num_ahead)]
            if s.samples and i not in lost else []
            for i, s in enumerate(batch.scheduled)
        ]  # fmt: skip
        return StepResult(tokens, {}, lost, self.epoch)


class DraftedRunner(CountingRunner):
    """Counts on, and over a draft as far as it counts on too. `breaks` and `loses`: only with a draft."""

    def __init__(self, breaks=False, loses=False):
        super().__init__()
        self.breaks, self.loses, self.drafts = breaks, loses, []

    def run(self, batch):
        self.steps.append([(s.sequence.request_id, s.num_tokens) for s in batch.scheduled])
        self.drafts.append([s.draft for s in batch.scheduled])
        if self.breaks and any(s.draft for s in batch.scheduled):
            raise RuntimeError("too many rows")
        lost = {
            i: ShardUnavailable("shard 1 is gone", 1)
            for i, s in enumerate(batch.scheduled)
            if (self.loses and s.draft) or s.sequence.request_id in self.lost
        }
        tokens = []
        for i, s in enumerate(batch.scheduled):
            after = [s.sequence.token_ids[-1], *s.draft]
            chosen = [(token + 1, None) for token in after]
            tokens.append(right_tokens(s.draft, chosen)[0] if s.samples and i not in lost else [])
        return StepResult(tokens, {}, lost, self.epoch)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def block_manager(num_blocks, config):
    return BlockManager(
        [BlockPool(num_blocks)], config.block_size, max_step_tokens=config.max_num_batched_tokens,
        prefix_caching=config.enable_prefix_caching,
    )  # fmt: skip


def make_engine(num_blocks=64, max_model_len=1000, clock=None, num_ahead=0, **limits):
    """An engine on a CountingRunner; blocks of 4 tokens."""
    config = EngineConfig(block_size=4, **limits)
    return Engine(
        CountingRunner(num_ahead), config, blocks=block_manager(num_blocks, config), eos_token_ids=(EOS,),
        max_model_len=max_model_len,
        metrics=EngineMetrics(new_registry(), "test"), clock=clock or Clock(),
    )  # fmt: skip


def request(request_id, prompt=(1,), timeout_s=None, **params):
    values = {"temperature": 0, "max_tokens": 4, **params}
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**values).with_defaults(SAMPLING_DEFAULTS),
        timeout_s=timeout_s,
    )


def run_to_end(engine):
    """Token ids and finish reason of every request."""
    answers = {}
    while engine.has_work:
        for update in engine.step():
            token_ids, _ = answers.get(update.request_id, ([], None))
            answers[update.request_id] = (token_ids + list(update.token_ids), update.finish_reason)
    return answers
