"""Loads the LoRA adapters of a model, or of a rank's part of one, and those that an engine begins with."""

from cluster.checkpoint.adapters import open_adapter
from cluster.checkpoint.spans import cuts_of
from cluster.config import EngineConfig, ModelConfig
from cluster.config.lora import AdapterList, AdapterSource
from cluster.config.tensor_parallel import share_of
from cluster.engine.adapters import Adapters, AdapterSetup, LoadAdapter
from cluster.model.adapters import Adapter, load_adapter
from cluster.model.decoder import CausalLM


def adapter_loader(model: CausalLM, whole: ModelConfig, config: EngineConfig, rank: int = 0) -> LoadAdapter:
    """model: a rank's part of the one that `whole` describes."""
    size = config.tensor_parallel_size
    cuts = cuts_of(share_of(whole, rank, size), whole) if size > 1 else {}

    def load(source: AdapterSource) -> Adapter:
        return load_adapter(model, open_adapter(source.directory, whole, config.max_lora_rank), source, cuts)

    return load


def begin_adapters(load: LoadAdapter, config: EngineConfig, setup: AdapterSetup) -> Adapters:
    """Raises CheckpointError."""
    adapters = Adapters(load, setup.share)
    if setup.given is None:
        adapters.follow(AdapterList.configured(config.lora_adapters))
    else:
        adapters.begin(setup.given)
    return adapters
