"""A cluster that changes while it answers, in virtual time: processes die and come back, replicas come and go."""

import random
from dataclasses import dataclass
from math import inf

from cluster.planning.simulation import Simulation
from cluster.runtime.front.autoscaling import autoscaling_config, wanted_replicas

LOOK_S = 10.0  # between two looks at the load: the policy's own is over the last so many seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """mean_s: of a process's life.  recovery_s: until its successor answers.  copied: each expert has a second copy, so
    that nobody waits for a shard's successor."""

    mean_s: float
    recovery_s: float
    copied: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """most: replicas.  start_s: of a new one."""

    most: int
    start_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Events:
    """None: there are none."""

    failures: Failures | None = None
    scaling: Scaling | None = None


def let_fail(simulation: Simulation, failures: Failures, seed: int = 0) -> None:
    """Processes die at random moments from now on."""
    draw = random.Random(seed)

    def plan_next() -> None:
        num_processes = simulation.num_replicas + simulation.cluster.shards
        simulation.after(draw.expovariate(max(1, num_processes) / failures.mean_s), die, None)

    def die(_: object) -> None:
        simulation.record.failures += 1
        if draw.randrange(max(1, simulation.num_replicas + simulation.cluster.shards)) < simulation.num_replicas:
            simulation.kill_replica(draw, failures.recovery_s)
        elif not failures.copied:
            simulation.stall(failures.recovery_s)
        plan_next()

    plan_next()


def let_scale(simulation: Simulation, scaling: Scaling) -> None:
    """Replicas follow the load by the policy that Serve is given."""
    least = simulation.cluster.replicas
    rules = autoscaling_config(least, max(least, scaling.most))
    since = {"more": inf, "fewer": inf}
    coming = 0

    def come(_: object) -> None:
        nonlocal coming
        coming -= 1
        simulation.add_replica()

    def look(_: object) -> None:
        nonlocal coming
        models = simulation.living_models()
        current = len(models) + coming
        wanted = wanted_replicas(
            current,
            running=[float(len(model.running)) for model in models],
            waiting=[float(len(model.waiting)) for model in models],
            kv_use=[model.used for model in models],
            seats=float(simulation.cluster.limits.max_num_seqs),
        )
        wanted = min(max(wanted, least), max(least, scaling.most))
        now = simulation.now
        since["more"] = min(since["more"], now) if wanted > current else inf
        since["fewer"] = min(since["fewer"], now) if wanted < current else inf
        if now - since["more"] >= rules["upscale_delay_s"]:
            for _number in range(wanted - current):
                coming += 1
                simulation.after(scaling.start_s, come, None)
            since["more"] = inf
        if now - since["fewer"] >= rules["downscale_delay_s"]:
            simulation.retire_replica()
            since["fewer"] = inf
        simulation.after(LOOK_S, look, None)

    simulation.after(LOOK_S, look, None)
