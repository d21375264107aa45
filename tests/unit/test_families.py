"""Each family is registered twice, on disk and as a model, and a model reads all that its checkpoint stores for it."""

import pytest
import torch
from configs import CONFIGS, DENSE_CONFIGS

from cluster.checkpoint.names import dense_shapes
from cluster.config import read_model_config
from cluster.config.architectures.registry import ARCHITECTURES
from cluster.model.registry import MODELS, load_model


class Reader:
    """Notes which tensors are wanted."""

    def __init__(self, config):
        self.config, self.wanted = config, {}

    def fetch(self, names, progress=None):
        pass

    def load(self, targets, progress=None, spans=None):
        self.wanted |= {name: tuple(target.shape) for name, target in targets.items()}


def test_every_family_can_be_read_and_computed():
    assert set(ARCHITECTURES) == set(MODELS)
    assert all(family.model_type == model_type for model_type, family in ARCHITECTURES.items())


@pytest.mark.parametrize("raw", (CONFIGS | DENSE_CONFIGS).values(), ids=[*CONFIGS, *DENSE_CONFIGS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_reads_its_checkpoints_dense_tensors(raw, dtype):
    reader = Reader(read_model_config(raw))
    load_model(reader, dtype=dtype, device=torch.device("cpu"))
    assert reader.wanted == dense_shapes(reader.config)
