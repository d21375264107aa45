"""How long a dispatcher waits, worked out by hand, and which shards it then leaves alone."""

import pytest
import torch

from cluster.experts.deadline import Deadline
from cluster.experts.patience import Patience
from cluster.experts.placement import PlacementPlan
from cluster.experts.routing import FixedPlan, Routing
from cluster.experts.transport import ExpertBatch


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_deadline_counts_down_and_is_only_postponed():
    clock = Clock()
    deadline = Deadline.after(clock, 2.0)
    sooner, later = deadline.earlier(1.0), deadline.earlier(9.0)
    assert (deadline.left_s, sooner.left_s, later.left_s) == (2.0, 1.0, 2.0)
    clock.now = 1.5
    assert (deadline.is_over, deadline.left_s) == (False, 0.5)
    assert (sooner.is_over, sooner.left_s) == (True, 0.0)
    deadline.postpone(1.0)
    deadline.postpone(4.0)
    assert (deadline.at, later.at) == (4.0, 2.0)


def test_an_answer_is_late_after_the_mean_and_four_deviations_of_recent_ones():
    """RFC 6298 with 1/8 and 1/4: 0.2 s gives 0.2 + 4 × 0.1. Again 0.2 s: 0.2 + 4 × 0.075. Then 0.6 s: the deviation
    becomes 0.075 + (0.4 - 0.075) / 4 = 0.15625, the mean 0.25."""
    patience = Patience(30.0)
    assert patience.late_s(8) == 1.0
    for wait_s, late_s in ((0.2, 0.6), (0.2, 0.5), (0.6, 0.25 + 4 * 0.15625)):
        patience.answered(8, wait_s)
        assert patience.late_s(8) == pytest.approx(late_s)
    assert patience.late_s(15) == patience.late_s(8), "as many bits"
    assert patience.late_s(16) == 1.0


@pytest.mark.parametrize(("wait_s", "late_s"), [(0.001, 0.1), (100.0, 5.0)])
def test_an_answer_is_late_neither_at_once_nor_never(wait_s, late_s):
    patience = Patience(30.0)
    patience.answered(1, wait_s)
    assert patience.late_s(1) == late_s


def test_a_silent_shard_gets_less_time_then_more_up_to_the_timeout():
    assert [Patience(30.0).silence_s(n) for n in (0, 1, 2, 3, 4, 1000)] == [30.0, 5.0, 10.0, 20.0, 30.0, 30.0]
    assert [Patience(1.0).silence_s(n) for n in (0, 1, 2)] == [1.0, 1.0, 1.0]


def test_ten_hedges_are_free_and_twenty_sendings_earn_another():
    patience = Patience(30.0)
    for _ in range(10):
        assert patience.allows_hedge
        patience.hedged()
    assert not patience.allows_hedge
    for _ in range(19):
        patience.sent()
    assert not patience.allows_hedge
    for _ in range(2):  # twenty times 0.05 may be a bit less than 1
        patience.sent()
    assert patience.allows_hedge


def batch(epoch, *ids):
    return ExpertBatch(
        layer_id=0, epoch=epoch, hidden_states=torch.zeros(len(ids), 1), topk_ids=torch.tensor(ids),
        topk_weights=torch.ones(len(ids), 1),
    )  # fmt: skip


def routing(clock, **options):
    """Expert 0 is on shards 0 and 1, expert 1 on shard 1 alone, expert 2 on shards 1 and 2."""
    slices = ({0: (0,)}, {0: (0, 1, 2)}, {0: (2,)})
    return Routing(FixedPlan(PlacementPlan(epoch=1, num_experts=3, slices=slices, **options)), clock)


def test_rows_are_covered_where_a_shard_of_which_nothing_bad_is_known_has_their_expert():
    clock = Clock()
    made = routing(clock)
    rows = batch(1, [0], [1], [2])
    assert made.covered(1, rows).tolist() == [True, False, True], "shard 1 has row 1 to do, so row 2 goes to shard 2"
    even = made.covered(1, batch(1, [2], [2], [2], [2])).tolist()
    assert even.count(False) == 2, "half of them go to either copy"
    made.failed(1, heard_at=0.0, silent=False)
    assert made.suspected() == {1}
    assert made.covered(1, rows).tolist() == [True, False, True]
    made.failed(2, heard_at=0.0, silent=True)
    assert made.covered(1, rows).tolist() == [True, False, False]
    assert (made.num_silences(1), made.num_silences(2)) == (0, 1)
    clock.now = 1.5
    assert made.suspected() == frozenset()
    made.answered(2)
    assert (made.num_silences(2), made.lost_since(2), made.lost_since(1)) == (0, None, 0.0)


def test_a_late_shard_can_be_done_without_where_all_its_experts_have_a_copy_that_is_up():
    made = routing(Clock())
    assert made.can_do_without(1, batch(1, [0], [2]))
    assert not made.can_do_without(1, batch(1, [0], [1]))
    assert not routing(Clock(), down=frozenset({2})).can_do_without(1, batch(1, [0], [2]))
