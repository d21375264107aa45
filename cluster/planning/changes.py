"""A cluster that changes while it answers, in virtual time: processes die and come back, replicas come and go."""

import random
from dataclasses import dataclass
from math import inf

from cluster.errors import SetupError
from cluster.planning.simulation import Simulation
from cluster.runtime.front.autoscaling import autoscaling_config, wanted_replicas

LOOK_S = 10.0  # between two looks at the load: the policy's own is over the last so many seconds
MOST_DEATHS = 100_000  # of a hundred processes that live an hour each: in six weeks


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """mean_s: of a process's life.  recovery_s: until its successor answers."""

    mean_s: float
    recovery_s: float


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


def let_fail(simulation: Simulation, failures: Failures, *, most_replicas: int, seed: int = 0) -> None:
    """Processes die at random moments from now on. most_replicas: that ever are to stay.

    Deaths are drawn as if all processes lived always, and one that falls on a dead process does nothing.
    Raises SetupError, in the simulation, where so many die that it would not end.
    """
    draw, drawn = random.Random(seed), 0
    num_shards = living_shards = simulation.cluster.shards

    def plan_next() -> None:
        num_processes = num_shards + max(most_replicas, simulation.num_replicas)
        simulation.after(draw.expovariate(num_processes / failures.mean_s), die, num_processes)

    def recover(_: object) -> None:
        nonlocal living_shards
        living_shards += 1

    def die(num_processes: int) -> None:
        nonlocal living_shards, drawn
        drawn += 1
        if drawn > MOST_DEATHS:
            raise SetupError(
                f"--mean-life {failures.mean_s:g} lets processes die over {MOST_DEATHS:,} times before the trace is "
                f"answered (--recovery {failures.recovery_s:g}): give a longer life"
            )
        place = draw.randrange(num_processes)
        if place < living_shards + simulation.num_replicas:
            simulation.record.failures += 1
            if place < living_shards:
                living_shards -= 1
                simulation.stall(failures.recovery_s)
                simulation.after(failures.recovery_s, recover, None)
            else:
                simulation.kill_replica(draw, failures.recovery_s)
        plan_next()

    plan_next()


def let_scale(simulation: Simulation, scaling: Scaling) -> None:
    """Replicas follow the load by the policy that Serve is given."""
    least = simulation.cluster.replicas
    rules = autoscaling_config(least, max(least, scaling.most))
    since = {"more": inf, "fewer": inf}

    def look(_: object) -> None:
        models, current = simulation.staying_models(), simulation.target
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
            simulation.target = wanted
            for _number in range(wanted - current):
                simulation.after(scaling.start_s, lambda _: simulation.add_replica(), None)
            since["more"] = inf
        if now - since["fewer"] >= rules["downscale_delay_s"]:
            simulation.retire_replica()
            since["fewer"] = inf
        simulation.after(LOOK_S, look, None)

    simulation.after(LOOK_S, look, None)
