"""The planner's answer to a measured setting, on the machine that was calibrated."""

from dataclasses import replace

from cluster.bench.planning.served import Setting
from cluster.config import DEFAULTS
from cluster.planning.calibration import Calibration
from cluster.planning.costs import FrontCosts
from cluster.planning.engine import Limits
from cluster.planning.load import ClosedLoad, Lengths, Load, OpenLoad
from cluster.planning.sharing import SharedCores
from cluster.planning.simulation import ClusterModel, Record, Simulation


def predict(found: Calibration, setting: Setting, cache_tokens: int = 1 << 30) -> Record:
    """All processes and the load share the machine's cores; the requests are those that are sent."""
    lengths = Lengths(prompt_tokens=setting.prompt_tokens, output_tokens=setting.output_tokens)
    load: Load
    if setting.rate is None:
        load = ClosedLoad(lengths, concurrency=setting.concurrency, num_requests=setting.num_requests)
    else:
        load = OpenLoad(lengths, rate=setting.rate, num_requests=setting.num_requests, seed=setting.seed)
    cluster = ClusterModel(
        replicas=setting.replicas,
        shards=setting.shards if found.num_experts else 0,
        limits=Limits(
            max_num_seqs=DEFAULTS["max_num_seqs"],
            max_num_batched_tokens=DEFAULTS["max_num_batched_tokens"],
            max_waiting=DEFAULTS["max_waiting"],
            cache_tokens=cache_tokens,
            block_size=DEFAULTS["block_size"],
        ),
        latency_s=found.front.latency_s,
        cores=SharedCores(num_cores=found.num_cores, front=_both(found), stretch=found.stretch),
    )
    return Simulation(cluster, found, load).run()


def _both(found: Calibration) -> FrontCosts:
    """The front, and the load's own processes beside it."""
    names = ("request_s", "prompt_token_s", "step_s", "token_s", "background_cores")
    sums = {name: getattr(found.front, name) + getattr(found.client, name) for name in names}
    return replace(found.front, **sums)
