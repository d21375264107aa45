"""What `moe-cluster bench calibrate` has measured of one model on one machine, in a file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.config import ModelConfig
from cluster.errors import InvalidRequest, SetupError
from cluster.inputs import number, shown, text, whole_number
from cluster.planning.costs import FrontCosts, StepWork
from cluster.planning.curve import Curve

VERSION = 1
CURVES = ("rows", "samples", "shared", "experts", "crossing")
TEXTS = ("model", "dtype", "machine")
COUNTS = ("num_cores", "memory_bytes", "num_layers", "num_experts", "top_k")
MAX_FILE_BYTES = 1 << 24
MOST = 1e15  # of all that it has: a petabyte of memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """model, dtype, machine: as they were measured.  num_cores: of the machine; each process computed on one thread.

    rows, samples: seconds of an attention replica's step against its tokens, and the rest against the sequences that
    choose a token.  context_s: for each token whose keys and values are read.  shared: the part that runs beside the
    shards, against rows.
    experts: of a step's routed experts on one shard, against rows.  call_s: of a layer's call to a shard without rows.
    crossing: of one layer and shard, against rows.
    serving_step_s, serving_sample_s, serving_call_s: core seconds that a served engine takes beside that for a step and
    for a sequence in it, and a shard for a layer's call.
    stretch: what a step of a served engine takes, over what all of these make of it.
    front, client: what is in front of the engines, and the load that was measured with.
    """

    model: str
    dtype: str
    machine: str
    num_cores: int
    memory_bytes: int
    num_layers: int
    num_experts: int
    top_k: int
    rows: Curve
    samples: Curve
    context_s: float
    shared: Curve
    experts: Curve
    call_s: float
    crossing: Curve
    serving_step_s: float = 0.0
    serving_sample_s: float = 0.0
    serving_call_s: float = 0.0
    stretch: float = 1.0
    front: FrontCosts
    client: FrontCosts

    def attention_s(self, work: StepWork) -> float:
        served = self.serving_step_s + self.serving_sample_s * work.samples
        return self.rows.at(work.rows) + self.samples.at(work.samples) + self.context_s * work.context + served

    def shared_s(self, rows: int) -> float:
        return self.shared.at(rows)

    def shard_s(self, rows: int, num_shards: int, imbalance: float = 1.0) -> float:
        calls_s = self.num_layers * self.call_s
        products_s = imbalance * max(0.0, self.experts.at(rows) - calls_s) / num_shards
        return calls_s + products_s + self.num_layers * self.serving_call_s

    def crossing_s(self, rows: int, num_shards: int) -> float:
        return self.num_layers * num_shards * self.crossing.at(rows)


def touched_experts(rows: float, num_experts: int, top_k: int) -> float:
    """Experts of a layer that some of the rows are sent to, if each row chooses evenly."""
    return float(num_experts * (1.0 - (1.0 - top_k / num_experts) ** rows))


def write_calibration(found: Calibration, path: Path) -> None:
    path.write_text(json.dumps({"version": VERSION, **asdict(found)}, indent=2) + "\n")


def read_calibration(path: Path) -> Calibration:
    """Raises SetupError."""
    source = f"--calibration {path}"
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SetupError(f"{source} cannot be read: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise SetupError(f"{source} has over {MAX_FILE_BYTES >> 20} MiB: `moe-cluster bench calibrate` writes less")
    try:
        raw = json.loads(content)
        if not isinstance(raw, dict) or raw.pop("version", None) != VERSION:
            raise SetupError(f"{source} is of another version or none: make it with `moe-cluster bench calibrate`")
        return _calibration_of(raw)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidRequest) as error:
        raise SetupError(f"{source} is no calibration ({error}): make it with `moe-cluster bench calibrate`") from None


def _calibration_of(raw: dict[str, Any]) -> Calibration:
    """Raises ValueError, KeyError, TypeError and InvalidRequest."""
    parts: dict[str, Any] = {}
    for name in CURVES:
        points = [(_quantity(x, name), _quantity(y, name)) for x, y in raw.pop(name)["points"]]
        parts[name] = Curve.through(points)
    for name in ("front", "client"):
        parts[name] = FrontCosts(**{key: _quantity(value, key) for key, value in raw.pop(name).items()})
    for name in TEXTS:
        parts[name] = text(raw.pop(name), name)
    for name in COUNTS:
        parts[name] = _count(raw.pop(name), name)
    parts |= {name: _quantity(value, name) for name, value in raw.items()}
    return Calibration(**parts)


def _quantity(value: Any, name: str) -> float:
    found = number(value, name)
    if not 0 <= found <= MOST:
        raise ValueError(f"{name} has {shown(value)}, 0 to {MOST:g} is possible")
    return found


def _count(value: Any, name: str) -> int:
    found = whole_number(value, name)
    least = 1 if name in ("num_cores", "memory_bytes") else 0
    if not least <= found <= MOST:
        raise ValueError(f"{name} is {shown(found)}, {least} to {MOST:g} is possible")
    return found


def check_model(found: Calibration, config: ModelConfig, dtype: str, path: Path) -> None:
    """Raises SetupError for a calibration of another model."""
    wanted = describe_shapes(config)
    if (found.model, found.dtype) != (wanted, dtype):
        raise SetupError(
            f"--calibration {path} is of another model ({found.model}, {found.dtype}), and this one has {wanted}, "
            f"{dtype}: run `moe-cluster bench calibrate` on it"
        )


def describe_shapes(config: ModelConfig) -> str:
    """The numbers that decide the time of a step."""
    experts = (
        f"dense of {config.intermediate_size}"
        if config.moe is None
        else f"{config.num_experts} experts of {config.moe.moe_intermediate_size}, top-{config.num_experts_per_tok}, "
        f"shared of {config.moe.shared_expert_intermediate_size}"
    )
    return (
        f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, {config.num_attention_heads} heads on "
        f"{config.num_key_value_heads}, {experts}, vocabulary {config.vocab_size}"
    )
