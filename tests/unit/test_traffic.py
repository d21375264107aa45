"""The figures that `moe-cluster bench serve` and `bench transport` compute from their times."""

import pytest

from cluster.bench.traffic import StreamTiming, summarize
from cluster.cli import main


def test_times_are_summed_up_by_percentile():
    """Two answers. The first has pieces of 1, 2 and 1 tokens at 0.1, 0.2 and 0.4 s: gaps of 0.1 and 0.2 s, 0.3 s for 3
    tokens after its first. The second has tokens at 0.3 and 0.4 s. Six tokens in 2 s."""
    result = summarize([StreamTiming(arrivals_s=(0.1, 0.2, 0.2, 0.4)), StreamTiming(arrivals_s=(0.3, 0.4))], took_s=2.0)
    assert (result.requests, result.failed, result.tokens_per_s) == (2, 0, 3.0)
    assert result.first_token_ms[0] == pytest.approx(200)
    assert result.gap_ms[0] == pytest.approx(100)
    assert result.gap_ms[2] == pytest.approx(100 + 0.98 * 100)
    assert result.per_token_ms == pytest.approx((100, 100, 100))


def test_a_failed_answer_counts_as_failed_and_in_no_time():
    result = summarize([StreamTiming(arrivals_s=(9.0,), error="gone"), StreamTiming(arrivals_s=(0.5,))], took_s=1.0)
    assert (result.requests, result.failed, result.errors) == (2, 1, ("gone",))
    assert result.first_token_ms == pytest.approx((500, 500, 500))
    assert result.tokens_per_s == 1.0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["serve", "--requests", "0"], "--requests is 0"),
        (["serve", "--rate", "0"], "--rate is 0"),
        (["transport", "--repeat", "1"], "--repeat at least"),
        (["throughput", "--compare", "vllm"], "--vllm-python"),
        (["throughput", "--compare", "vllm", "--vllm-python", "/bin/false"], "cannot import vllm"),
    ],
)
def test_arguments_that_cannot_be_carried_out_are_refused_at_once(arguments, named, capsys):
    assert main(["bench", *arguments]) == 2
    assert named in capsys.readouterr().err
