"""Each family is registered twice, on disk and as a model, and what it computes with is what its checkpoint stores."""

import pytest
import torch
from configs import CONFIGS, DENSE_CONFIGS

from cluster.checkpoint.names import dense_shapes
from cluster.config import read_model_config
from cluster.config.architectures.registry import ARCHITECTURES
from cluster.model.registry import MODELS


def test_every_family_can_be_read_and_computed():
    assert set(ARCHITECTURES) == set(MODELS)
    assert all(family.model_type == model_type for model_type, family in ARCHITECTURES.items())


@pytest.mark.parametrize("raw", (CONFIGS | DENSE_CONFIGS).values(), ids=[*CONFIGS, *DENSE_CONFIGS])
def test_a_models_weights_are_its_checkpoints_dense_tensors(raw):
    config = read_model_config(raw)
    with torch.device("meta"):
        model = MODELS[config.model_type](config)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == dense_shapes(config)
