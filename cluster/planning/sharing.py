"""How long a step takes while other engines make theirs: they queue at the same shards, and may share cores.

k engines that go round with P seconds each, D of them at one shared place with c servers, need at least k D / c for a
round of all. A round takes P while the place is nearly idle, k D / c when it is full, and somewhat more than either
between. Source of the bounds: Denning and Buzen, The Operational Analysis of Queueing Network Models (1978).
"""

from dataclasses import dataclass, replace

from cluster.planning.costs import FrontCosts, StepTime

# The bounds' p-norm: two engines at their knee take 1.26 of either bound. Exact mean value analysis has 1.25 there,
# with exponential times.
SHARPNESS = 3.0
LEAST_S = 1e-9  # of a step, so that time goes on where a calibration has zeros
LEAST_CORES = 0.05  # what is left of a machine whose background takes all


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedCores:
    """A machine whose cores all processes share. front: of the processes in front, the load's own if it comes from
    this machine.  stretch: as of `Calibration`."""

    num_cores: float
    front: FrontCosts
    stretch: float = 1.0

    def times(self, num_machines: int) -> "SharedCores":
        """As many such machines, as if they were one."""
        front = replace(self.front, background_cores=num_machines * self.front.background_cores)
        return replace(self, num_cores=num_machines * self.num_cores, front=front)

    @property
    def left(self) -> float:
        return max(LEAST_CORES, self.num_cores - self.front.background_cores)


def step_s(time: StepTime, num_busy: int, *, cores: SharedCores | None, front_s: float = 0.0) -> float:
    """Seconds of a step while num_busy engines make steps, this one included.

    cores: None where each process has hardware of its own.  front_s: as of `FrontCosts.of_step`.
    """
    alone = time.alone * (1.0 if cores is None else cores.stretch)
    bounds = alone**SHARPNESS
    if num_busy > 1:
        bounds += (num_busy * time.shard) ** SHARPNESS
    if cores is not None:
        bounds += (num_busy * (time.core_seconds + front_s) / cores.left) ** SHARPNESS
    return max(LEAST_S, float(bounds ** (1 / SHARPNESS)))
