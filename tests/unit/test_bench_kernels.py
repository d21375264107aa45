"""`moe-cluster bench kernels`: its timing on a clock of its own, its cases beside their definitions, its table."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.bench.arguments import add_arguments
from cluster.bench.command import run
from cluster.bench.kernels import reading
from cluster.bench.kernels.attention import attention_cases, left_out, make_paged
from cluster.bench.kernels.case import Case, Measured
from cluster.bench.kernels.experts import expert_cases, routings
from cluster.bench.kernels.products import product_cases
from cluster.bench.kernels.quantized import quantized_cases
from cluster.bench.kernels.reading import Reading, num_turns
from cluster.bench.kernels.sampling import sampling_cases
from cluster.bench.kernels.table import to_markdown
from cluster.bench.kernels.timing import PASS_S, least_seconds
from cluster.bench.machine import Machine
from cluster.bench.sampling import SAMPLINGS
from cluster.checkpoint.made.demo import write_demo_checkpoint
from cluster.checkpoint.made.published import A2_7B_CONFIG
from cluster.config import ModelConfig, read_model_config
from cluster.errors import SetupError
from cluster.kernels.attention import make_attention
from cluster.kernels.native.library import variants
from cluster.kernels.paged import attention_reference
from cluster.kernels.sampling.rule import Chosen

SMALL = read_model_config(
    {
        **A2_7B_CONFIG, "hidden_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "num_experts": 12,
    }
)  # fmt: skip


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "bytes_beyond_caches", lambda: 1 << 16)


class FakeTime:
    """A clock that calls move on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turns: list[int] = []

    def takes(self, seconds: float, disturbed: float = 0.0) -> Callable[[int], None]:
        """Every third call is disturbed."""

        def call(turn: int) -> None:
            self.turns.append(turn)
            self.now += seconds + (disturbed if len(self.turns) % 3 else 0.0)

        return call


def test_the_least_of_a_ways_calls_counts_and_no_turn_comes_twice() -> None:
    time = FakeTime()
    least = least_seconds(
        {"slow": time.takes(PASS_S), "fast": time.takes(PASS_S / 8, disturbed=1.0)}, 3, lambda: time.now
    )
    assert least == {"slow": pytest.approx(PASS_S), "fast": pytest.approx(PASS_S / 8)}
    assert time.turns == list(range(len(time.turns)))


def test_short_calls_are_timed_together() -> None:
    time = FakeTime()
    assert least_seconds({"short": time.takes(1e-6)}, 1, lambda: time.now)["short"] == pytest.approx(1e-6)
    assert len(time.turns) >= PASS_S / 1e-6


def test_the_unit_is_what_bounds_the_kernel() -> None:
    """A product of 8 rows makes 16 operations with 2 bytes; of 512 rows 1024."""

    def unit(num_bytes: float, num_flops: float) -> str:
        return Case(kernel="", size="", ways={}, num_bytes=num_bytes, num_flops=num_flops, chosen="").unit

    assert unit(2e6, 16e6) == "GB/s"
    assert unit(2e6, 1024e6) == "GFLOP/s"
    assert unit(0, 0) == "ms"


def test_buffers_are_more_than_the_caches_hold_together() -> None:
    assert num_turns(1 << 10) == 32
    assert num_turns(1 << 20) == 1
    assert num_turns(1) == 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_of_a_product_gives_the_same(dtype: torch.dtype) -> None:
    cases = list(product_cases(SMALL, dtype, (1, 3), variants()))
    assert [case.kernel for case in cases[::2]] == [
        "qkv, 128 x 64", "o, 64 x 64", "shared expert, gate and up, 192 x 64", "shared expert, down, 64 x 96",
        "lm_head, 512 x 64",
    ]  # fmt: skip
    for case in cases:
        assert set(variants()) < set(case.ways)
        for turn in (0, 1, 1000):
            expected = case.ways["torch"](turn)
            assert isinstance(expected, torch.Tensor)
            for way, call in case.ways.items():
                found = call(turn)
                torch.testing.assert_close(found, expected, msg=lambda text, way=way: f"{way}: {text}")
    assert cases[0].num_bytes == 128 * 64 * dtype.itemsize
    assert cases[1].num_flops == 2 * 3 * 128 * 64


def test_torchs_products_in_8_and_4_bits_are_those_of_the_kernels() -> None:
    """Both from the same rounded numbers; 4 bits want inputs of whole groups and outputs by 64."""
    config = dataclasses.replace(SMALL, hidden_size=128)
    torch.manual_seed(0)
    cases = list(quantized_cases(config, torch.bfloat16, (1, 5), variants()))
    assert [case.kernel.partition(",")[0] for case in cases[::2]] == ["int8 shared expert", "int4 shared expert"] * 2
    for case in cases[:4]:
        expected = case.ways["torch"](1)
        assert isinstance(expected, torch.Tensor)
        for way in variants():
            found = case.ways[way](1)
            assert isinstance(found, torch.Tensor)
            assert (found.float() - expected.float()).abs().max() <= 0.03 * expected.abs().max(), way


def test_each_turn_touches_as_many_experts() -> None:
    routes = routings(num_tokens=5, num_experts=12, top_k=4)
    assert len(routes) == 12
    assert len({len(set(ids.flatten().tolist())) for ids in routes}) == 1
    for ids in routes:
        assert all(len(set(row)) == 4 for row in ids.tolist())
        assert ids.min() >= 0
        assert ids.max() < 12
    assert not torch.equal(routes[0], routes[1])


def test_the_bytes_of_a_step_are_those_of_its_active_experts() -> None:
    """One token has 4 experts of 3 · 64 · 32 bfloat16."""
    [case] = expert_cases(SMALL, torch.bfloat16, (1,), variants())
    assert case.size == "batch 1, 4 active"
    assert case.num_bytes == 4 * 3 * 64 * 32 * 2
    expected = case.ways["torch"](2)
    assert isinstance(expected, torch.Tensor)
    assert expected.abs().max() > 0
    for call in case.ways.values():
        found = call(2)
        assert isinstance(found, torch.Tensor)
        torch.testing.assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0.02)


def test_attention_too_large_to_measure_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A2.7B's layer has 8,192 bytes of keys and values a token in bfloat16: 2 x 262,144 tokens take 4.29 GB."""
    config = read_model_config(A2_7B_CONFIG)
    line = "attention, batch 2, context 262144 is left out: its keys and values take 4.29 GB, more than 2.15"
    assert left_out(config, torch.bfloat16, (1, 2), (8, 262144))[-1] == line
    assert not left_out(config, torch.bfloat16, (1, 2), (8,))
    file = tmp_path / "kernels.json"
    arguments = ["--kernels", "attention", "--batch", "2", "--context", "262144", "--threads", "1", "--repeat", "1"]
    assert run(parse(*arguments, "--json", str(file))) == 0
    printed = capsys.readouterr()
    assert line in printed.err
    assert line in printed.out
    assert json.loads(file.read_text())["left_out"] == [line]


def test_attention_is_that_of_its_definition() -> None:
    case, *eight = attention_cases(SMALL, torch.float32, (3,), (20,), variants())
    assert case.num_bytes == 2 * 3 * 20 * 2 * 16 * 4
    torch.manual_seed(0)
    paged, caches = make_paged(SMALL, torch.float32, 3, 20, 2)
    assert len(caches) == 2
    q = torch.randn(3, 4, 16)
    k_cache, v_cache = caches[1]
    found = make_attention(k_cache, num_heads=4).plan(paged).attend(q, k_cache, v_cache, scale=0.25, window=None)
    expected = attention_reference(q, k_cache, v_cache, paged, scale=0.25, window=None)
    torch.testing.assert_close(found, expected)
    found = [call(1) for call in case.ways.values()]
    assert len(found) == 1 + len(variants())
    for one in found[1:]:
        torch.testing.assert_close(one, found[0])
    for rounded, near in zip(eight, (0.3, 0.03), strict=True):  # e4m3, then whole numbers
        assert (rounded.unit, len(rounded.ways)) == ("ms", 2 + len(variants()))
        rows = {way: call(1) for way, call in rounded.ways.items()}
        assert torch.equal(rows.pop("plain cache"), case.ways[case.chosen](1))
        for one in rows.values():
            torch.testing.assert_close(one, rows["torch"])
            assert 0 < (one - found[0]).abs().max() < near


def test_every_way_of_sampling_chooses_the_same_tokens() -> None:
    for case in sampling_cases(SMALL, torch.bfloat16, (1, 3), tuple(SAMPLINGS.values()), variants()):
        assert case.unit == "ms"
        chosen = [call(0) for call in case.ways.values()]
        assert len(chosen) == 1 + len(variants())
        for one in chosen:
            assert isinstance(one, Chosen)
            assert len(one.token_ids) == int(case.size.removeprefix("batch "))
            assert one.token_ids == chosen[0].token_ids
            assert min(one.token_ids) >= 0


def test_a_plain_read_reads_it_all() -> None:
    """The buffer is 8192 ones of 8 bytes: as int64 their sum is 8192, and so it is as pairs of 1 and 0 of 4 bytes."""
    case = Reading(variants()).case(0, "torch")
    assert case.num_bytes == 1 << 16
    assert case.ways["torch int64"](0) == 8192
    assert all(case.ways[name](0) == 8192 for name in variants())


MACHINE = Machine(
    cpu="Example CPU", cpu_features=("avx2",), num_cores=2, memory_bytes=24 << 30, gpus=(),
    versions=(("torch", "2.13.0"),),
)  # fmt: skip


def test_the_table_has_a_column_for_each_variant() -> None:
    """25 MB in 1, 2 and 4 ms are 25, 12.5 and 6.25 GB/s; a plain read takes 0.9 ms for as many."""
    product = Measured(
        kernel="qkv", size="batch 1", threads=2, unit="GB/s", num_bytes=25e6, num_flops=25e6, chosen="avx2",
        seconds={"torch": 4e-3, "torch packed": 2e-3, "avx2": 1e-3, "plain": 4e-3}, read_s=0.9e-3,
    )  # fmt: skip
    sampling = Measured(
        kernel="greedy", size="batch 1", threads=1, unit="ms", num_bytes=0.0, num_flops=0.0, chosen="torch",
        seconds={"torch": 150e-3}, read_s=0.0,
    )  # fmt: skip
    text = to_markdown(MACHINE, "4 layers", 7, [product, sampling])
    assert text.startswith(
        "Machine: 2 cores of Example CPU (avx2), 24 GiB memory; torch 2.13.0.\n\nShapes: 4 layers.\n"
    )
    assert "least of 7 rounds" in text
    assert text.endswith(
        "| kernel | size    | threads | unit | torch | avx2 | plain | now  | of a read | torch / now |\n"
        "| ------ | ------- | ------- | ---- | ----- | ---- | ----- | ---- | --------- | ----------- |\n"
        "| qkv    | batch 1 | 2       | GB/s | 12.5  | 25.0 | 6.25  | 1.00 | 0.90      | 2.00        |\n"
        "| greedy | batch 1 | 1       | ms   | 150   | -    | -     | 150  | -         | 1.00        |\n"
    )


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["kernels", *arguments])


def test_the_command_measures_a_models_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_demo_checkpoint(tmp_path / "demo")
    file = tmp_path / "kernels.json"
    arguments = ["--batch", "1", "--context", "8", "--threads", "1", "--repeat", "1", "--sampling", "greedy"]
    assert run(parse(str(tmp_path / "demo"), *arguments, "--json", str(file))) == 0
    out = capsys.readouterr().out
    kernels = ["read", "qkv,", "int8 shared expert, down", "int4 shared expert, down", "experts,", "attention,"]
    for name in (*kernels, "attention in int8,", "sampling, greedy", "masks, 32 steps"):
        assert f"| {name}" in out
    cases = json.loads(file.read_text())["cases"]
    assert len(cases) == 1 + 5 + 2 * 2 + 1 + 3 + 1 + 1
    assert all(0 < seconds < 60 for case in cases for seconds in case["seconds"].values())


@pytest.mark.parametrize("option", ["--batch", "--context", "--threads", "--repeat"])
def test_numbers_below_one_are_refused(option: str) -> None:
    with pytest.raises(SetupError, match=option):
        run(parse(option, "0"))


def test_only_the_named_kernels_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("--kernels", "sampling,experts").kernels == ("sampling", "experts")
    with pytest.raises(SystemExit):
        parse("--kernels", "conv")
    assert "known are products, quantized, experts, attention, sampling, masks" in capsys.readouterr().err


def test_a_dense_model_has_no_experts_to_measure() -> None:
    dense: ModelConfig = dataclasses.replace(SMALL, moe=None)
    assert list(expert_cases(dense, torch.float32, (1,), {})) == []
    names = [case.kernel for case in product_cases(dense, torch.float32, (1,), {})]
    assert names[2] == f"mlp, gate and up, {2 * SMALL.intermediate_size} x 64"
