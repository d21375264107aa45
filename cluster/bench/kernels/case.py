"""A kernel at one size, and the ways to compute it. Knows no kernel."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Call = Callable[[int], object]  # computes once, over the memory of a turn: 0, 1, 2, …

TORCH = "torch"  # begins the name of each of torch's own ways: "torch", "torch packed"
_FLOPS_A_BYTE = 64  # from here on a product is bound by arithmetic, and shown by it


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel at one size.

    ways: by name, those of torch and a variant's of the native kernels.
    num_bytes: that a call must read of weights or cache, 0 where they lie in the processor's caches in use too, or
    where the ways read different numbers of them.
    num_flops: of a call, 0 where nobody counts them.
    chosen: the way that this process would take.
    """

    kernel: str
    size: str
    ways: Mapping[str, Call]
    num_bytes: float
    num_flops: float
    chosen: str

    @property
    def unit(self) -> str:
        if not self.num_bytes:
            return "ms"
        return "GFLOP/s" if self.num_flops >= _FLOPS_A_BYTE * self.num_bytes else "GB/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A case's figures. seconds: the least of a call, by way.  read_s: of a plain read of as many bytes, measured in
    turns with them, 0 where there is none."""

    kernel: str
    size: str
    threads: int
    unit: str
    num_bytes: float
    num_flops: float
    chosen: str
    seconds: Mapping[str, float]
    read_s: float

    def value(self, way: str) -> float:
        """In the case's unit."""
        took = self.seconds[way]
        if self.unit == "ms":
            return 1e3 * took
        return 1e-9 * (self.num_flops if self.unit == "GFLOP/s" else self.num_bytes) / took

    @property
    def torch_way(self) -> str | None:
        """The fastest of torch's own."""
        return min((way for way in self.seconds if way.startswith(TORCH)), key=self.seconds.__getitem__, default=None)
