"""Sampling parameters of any Python type: taken for what they are, or refused with the field's name."""

import itertools
import math
import pickle
from dataclasses import fields
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.client.grpc_client import sampling_message
from cluster.errors import InvalidRequest
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.serving.grpc.messages import to_sampling_params
from cluster.types import SamplingParams

FIELDS = [field.name for field in fields(SamplingParams)]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 30),
    st.floats(),
    st.floats(0, 2),
    st.decimals(),
    st.fractions(),
    st.complex_numbers(),
    st.text(),
    st.text(st.characters(exclude_categories=())),
    st.binary(),
    st.dates(),
    st.just(10**300),
    st.just(-(10**400)),
    st.builds(object),
    st.sampled_from(
        [np.bool_(True), np.int64(3), np.uint8(200), np.float16(0.5), np.float64("nan"), np.str_("x"), int]
    ),
    st.sampled_from([np.array(4), np.array(0.5), torch.tensor(3), torch.tensor(0.5), torch.tensor(True)]),
    st.sampled_from([torch.empty(2, device="meta"), torch.tensor([7]), np.array([1, 2]), np.zeros((2, 2), dtype=int)]),
)
VALUES = st.recursive(
    SCALARS,
    lambda parts: st.one_of(
        st.lists(parts, max_size=20),
        st.lists(parts, max_size=3).map(tuple),
        st.lists(parts, max_size=3).map(iter),
        st.dictionaries(st.text(max_size=3), parts, max_size=3),
        st.sets(st.integers() | st.text(), max_size=3),
    ),
    max_leaves=20,
)


@given(st.sampled_from(FIELDS), VALUES)
def test_any_value_of_any_field_is_taken_or_refused_by_name(field, value):
    try:
        params = SamplingParams(**{field: value})
    except InvalidRequest as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert refusal.field == field
        assert str(refusal).isprintable()
        assert len(str(refusal)) < 300
        return
    assert pickle.loads(pickle.dumps(params)) == params
    message = pb.SamplingParams.FromString(sampling_message(params).SerializeToString())
    assert to_sampling_params(message) == params


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"min_tokens": None}, {"min_tokens": 0}),
        ({"ignore_eos": None}, {"ignore_eos": False}),
        ({"ignore_eos": np.bool_(True)}, {"ignore_eos": True}),
        ({"stop": None, "stop_token_ids": None}, {"stop": (), "stop_token_ids": ()}),
        ({"stop": iter(["a", "b"])}, {"stop": ("a", "b")}),
        ({"stop_token_ids": np.array([1, 2])}, {"stop_token_ids": (1, 2)}),
        ({"stop_token_ids": torch.tensor([3])}, {"stop_token_ids": (3,)}),
        ({"stop_token_ids": {4}}, {"stop_token_ids": (4,)}),
        ({"stop_token_ids": list(torch.tensor([3, 4]))}, {"stop_token_ids": (3, 4)}),
        ({"top_k": np.int32(5), "max_tokens": torch.tensor(9)}, {"top_k": 5, "max_tokens": 9}),
        ({"temperature": np.float32(0.5), "top_p": Fraction(1, 2)}, {"temperature": 0.5, "top_p": 0.5}),
        ({"temperature": 1}, {"temperature": 1.0}),
    ],
)
def test_a_value_with_one_meaning_is_taken(given, expected):
    params = SamplingParams(**given)
    for name, value in expected.items():
        found = getattr(params, name)
        assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("stop_token_ids", ["a"], "'a' at position 0"),
        ("stop_token_ids", [1, -1], "stop_token_ids is -1, it must be at least 0"),
        ("stop_token_ids", [2**31], "stop_token_ids is 2147483648, it must be"),
        ("stop_token_ids", [1] * (2**18 + 1), "stop_token_ids has more than 262144 ids"),
        ("stop_token_ids", [1, True], "True at position 1"),
        ("stop_token_ids", [[1]], r"\[1\] at position 0"),
        ("stop_token_ids", b"abc", "b'abc'"),
        ("stop_token_ids", 5, "a list of token ids is needed"),
        ("stop_token_ids", itertools.count(), "more than"),
        ("stop", b"abc", "a text or a list of texts is needed"),
        ("stop", [b"abc"], "b'abc'"),
        ("stop", "", "0 characters"),
        ("stop", "\ud800", "lone surrogate"),
        ("stop", itertools.repeat("a"), "at most 16"),
        ("stop", {"a": 1}, "a text or a list"),
        ("ignore_eos", "no", "true or false"),
        ("ignore_eos", 1, "true or false"),
        ("min_tokens", True, "a whole number"),
        ("max_tokens", 16.0, "a whole number"),
        ("seed", 2**63, "at most"),
        ("temperature", math.nan, "nan"),
        ("temperature", "0.5", "a number"),
        ("temperature", np.array([0.5]), "a number"),
        ("top_p", True, "a number"),
        ("top_k", np.bool_(True), "a whole number"),
        ("top_k", torch.tensor([5]), "a whole number"),
    ],
)
def test_a_value_without_meaning_is_refused_with_its_field(field, value, words):
    with pytest.raises(InvalidRequest, match=words) as refusal:
        SamplingParams(**{field: value})
    assert refusal.value.field == field


@pytest.mark.parametrize("field", ["max_tokens", "temperature", "seed", "stop", "stop_token_ids", "ignore_eos"])
def test_a_number_that_python_does_not_write_out_is_refused_all_the_same(field):
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParams(**{field: 10**5000})
    assert refusal.value.field == field
    assert len(str(refusal.value)) < 120


def test_a_value_that_cannot_be_shown_is_refused_all_the_same():
    class Broken:
        def __repr__(self):
            raise RuntimeError("no")

    with pytest.raises(InvalidRequest, match="a Broken"):
        SamplingParams(seed=Broken())


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (1e-40, True), (9.9e-6, True), (1e-5, False)])
def test_a_temperature_below_vllms_bound_is_greedy_over_grpc_too(temperature, greedy):
    """vLLM's `_SAMPLING_EPS` is 1e-5."""
    assert SamplingParams(temperature=temperature).greedy is greedy
    assert to_sampling_params(pb.SamplingParams(temperature=temperature)).greedy is greedy


def test_parameters_of_a_mapping_are_those_of_its_names():
    assert SamplingParams.from_mapping({"top_k": 3, "stop": "x"}) == SamplingParams(top_k=3, stop="x")
    with pytest.raises(InvalidRequest, match="'best_of' is unknown; known: temperature"):
        SamplingParams.from_mapping({"best_of": 3})
