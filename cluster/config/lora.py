"""A LoRA adapter's adapter_config.json, as PEFT writes it: its ranks and factors. Reads no files, knows no model.

An adapter changes a linear layer to W x + scale · B (A x); anything else that one can ask for is refused by its name.
Source: Hu et al., LoRA; Kalajdzievski, rsLoRA; the keys are those of PEFT 0.21's LoraConfig.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.config.json_keys import Keys, shown
from cluster.errors import CheckpointError, SetupError
from cluster.evolving import evolving

ADAPTER_CONFIG = "adapter_config.json"
MAX_RANK = 4096
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
"""Of an adapter."""
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Of init_lora_weights: with any other one (PiSSA, OLoRA, LoftQ …) the base's weights were changed as well."""

_SERVED = frozenset((
    "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "layers_pattern", "bias", "init_lora_weights", "peft_type",
))  # fmt: skip
_WITHOUT_EFFECT = frozenset((  # once it is trained
    "lora_dropout", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
))  # fmt: skip


@evolving("cluster.config.lora")
@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSource:
    """Where an adapter is to be read. number: another one for each load, so that two loads of a name differ.
    has_experts: it is known to change routed experts."""

    name: str
    directory: str
    number: int
    has_experts: bool = False


@evolving("cluster.config.lora")
@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterList:
    """All adapters of a cluster. version: grows with every change; 0 for those of a configuration.
    next_number: above those of all loads so far."""

    version: float = 0.0
    adapters: tuple[AdapterSource, ...] = ()
    next_number: int = 0

    @classmethod
    def configured(cls, given: Mapping[str, Any] | None) -> "AdapterList":
        """given: directories by name."""
        found = enumerate((given or {}).items())
        adapters = tuple(AdapterSource(name=name, directory=path, number=i) for i, (name, path) in found)
        return cls(adapters=adapters, next_number=len(adapters))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(adapter.name for adapter in self.adapters)

    def find(self, name: str) -> AdapterSource | None:
        return next((adapter for adapter in self.adapters if adapter.name == name), None)

    def loaded(self, name: str, directory: str, version: float, *, has_experts: bool = False) -> "AdapterList":
        """With one more, or with another one of that name."""
        number = self.next_number
        source = AdapterSource(name=name, directory=directory, number=number, has_experts=has_experts)
        rest = self.unloaded(name, version).adapters
        return AdapterList(version=version, adapters=(*rest, source), next_number=number + 1)

    def unloaded(self, name: str, version: float) -> "AdapterList":
        rest = tuple(adapter for adapter in self.adapters if adapter.name != name)
        return AdapterList(version=version, adapters=rest, next_number=self.next_number)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """target_modules: names, or the ends of names behind a dot; a text is a regular expression for all of a name.
    rank_pattern, alpha_pattern: other values for modules whose names end as the expression that is their key.
    is_partial: the targets of some layers only, or not all of them."""

    rank: int
    alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...] | str
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    is_partial: bool

    def targets(self, module: str) -> bool:
        """module: as `model.layers.0.self_attn.q_proj`."""
        if isinstance(self.target_modules, str):
            return self.target_modules == "all-linear" or re.fullmatch(self.target_modules, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in self.target_modules)

    def rank_of(self, module: str) -> int:
        return next((rank for key, rank in self.rank_pattern.items() if _is_of(key, module)), self.rank)

    def scale_of(self, module: str) -> float:
        """The factor on B A."""
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if _is_of(key, module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_lora_config(raw: Mapping[str, Any], where: str) -> LoraConfig:
    """where: the file, for a message. Raises CheckpointError for another kind of adapter, and for each key whose effect
    is not computed here."""
    keys = Keys(raw, where)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type is {shown(raw.get('peft_type'))}, only LORA is served")
    if raw.get("bias", "none") not in ("none", None):
        raise CheckpointError(
            f"{where}: bias is {shown(raw['bias'])}: an adapter with biases is not served, train none"
        )
    start = raw.get("init_lora_weights", True)
    if not any(start is plain or start == plain for plain in PLAIN_STARTS):
        raise CheckpointError(
            f"{where}: init_lora_weights is {shown(start)}, by which the base was changed too: save it as a plain "
            "adapter (peft: save_pretrained(…, path_initial_model_for_weight_conversion=…))"
        )
    for key, value in raw.items():
        if key not in _SERVED | _WITHOUT_EFFECT and value not in (None, False, [], {}, ""):
            raise CheckpointError(
                f"{where}: {key} is {shown(value)}, which is not served: merge this adapter into its base (peft: "
                "merge_and_unload) and serve that"
            )
    return LoraConfig(
        rank=keys.count("r", at_most=MAX_RANK),
        alpha=keys.number("lora_alpha"),
        use_rslora=keys.flag("use_rslora", False),
        target_modules=_targets(raw, where),
        rank_pattern={key: one.count(key, at_most=MAX_RANK) for key, one in _pattern(raw, "rank_pattern", where)},
        alpha_pattern={key: one.number(key) for key, one in _pattern(raw, "alpha_pattern", where)},
        is_partial=any(raw.get(key) for key in ("exclude_modules", "layers_pattern"))
        or raw.get("layers_to_transform") is not None,
    )


def _targets(raw: Mapping[str, Any], where: str) -> tuple[str, ...] | str:
    given = raw.get("target_modules")
    if isinstance(given, str):
        _check_pattern(given, "target_modules", where)
        return given
    if not isinstance(given, list) or not given or not all(isinstance(name, str) and name for name in given):
        raise CheckpointError(
            f"{where}: target_modules is {shown(given)}, a list of names or a regular expression is needed"
        )
    return tuple(given)


def _pattern(raw: Mapping[str, Any], key: str, where: str) -> list[tuple[str, Keys]]:
    """The entries of an object whose keys are regular expressions."""
    given = raw.get(key) or {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{where}: {key} is {shown(given)}, an object is needed")
    for pattern in given:
        _check_pattern(pattern, key, where)
    return [(pattern, Keys(given, f"{where}, {key}")) for pattern in given]


def _check_pattern(pattern: str, key: str, where: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{where}: {key} has {shown(pattern)}, which is no regular expression") from error


def _is_of(pattern: str, module: str) -> bool:
    """As PEFT looks its patterns up."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def check_names(adapters: Mapping[str, Any]) -> None:
    """Raises SetupError for a name that no request could give, and for a directory that is no text."""
    for name, directory in adapters.items():
        if not NAME.fullmatch(name):
            raise SetupError(
                f"lora_adapters has {shown(name)}: a name of up to 128 letters, digits, - _ . : / is needed"
            )
        if not isinstance(directory, str) or not directory or "\0" in directory:
            raise SetupError(f"lora_adapters has {shown(directory)} for {name}, an adapter's directory is needed")


def check_adapters(adapters: Mapping[str, Any] | None, most: int) -> None:
    """Raises SetupError as `check_names`, and for more than may be loaded."""
    check_names(adapters or {})
    if len(adapters or {}) > most:
        raise SetupError(f"lora_adapters has {len(adapters or {})}, max_loras is {most}: allow more")
